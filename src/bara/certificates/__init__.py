"""A bound on the error rate of an adapter."""
