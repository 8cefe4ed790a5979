"""Rank functions in Triton, for GPUs, and who gets them; imported where they are wanted alone."""
