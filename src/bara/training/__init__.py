"""What training needs besides the data: losses, a callback, trainers."""
