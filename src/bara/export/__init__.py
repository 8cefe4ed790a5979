"""Adapters that run without bara."""
