"""Adapters behind an API: a server, its queue, and a page for people."""
