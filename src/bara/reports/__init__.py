"""Pictures, pages and cards of what was measured."""
