"""From a recipe and a table to a folder, and back."""
