"""Where random numbers come from, and the contexts that use them."""
