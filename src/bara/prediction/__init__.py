"""Predictive distributions: mixtures over draws of the posterior."""
