"""Tables of texts, and what a text model reads of them."""
