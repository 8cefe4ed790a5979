"""Bayesian low-rank adaptation with adaptive rank, as PEFT methods."""

from bara.configs import BaloraConfig, BaraConfig
from bara.errors import BaraError
from bara.sampling import sampling
from bara.training import BayesianCallback, kl_loss, kl_terms, set_progress
from bara.tuner import register

register()

__all__ = [
    "BaloraConfig",
    "BaraConfig",
    "BaraError",
    "BayesianCallback",
    "kl_loss",
    "kl_terms",
    "sampling",
    "set_progress",
]
