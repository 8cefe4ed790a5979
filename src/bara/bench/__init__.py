"""`bara bench`: every method on the same work, in cells that can be run again."""
