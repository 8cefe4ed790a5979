"""Bayesian low-rank adaptation with adaptive rank, as PEFT methods."""

from bara.abstention import Threshold, calibrate_threshold
from bara.configs import BaloraConfig, BaraConfig
from bara.errors import BaraError
from bara.generation import Generation, generate
from bara.multiple_choice import multiple_choice
from bara.prediction import evaluate, predict
from bara.predictive import ClassificationPredictive, Predictive, RegressionPredictive
from bara.ranks import EffectiveRank, calibrate_gates, effective_rank
from bara.sampling import sampling
from bara.streaming import StreamedToken, generate_stream
from bara.trainer import KLMixin
from bara.training import (
    BayesianCallback,
    elbo_loss,
    gaussian_nll,
    kl_loss,
    kl_terms,
    set_progress,
)
from bara.tuner import register

register()

__all__ = [
    "BaloraConfig",
    "BaraConfig",
    "BaraError",
    "BayesianCallback",
    "ClassificationPredictive",
    "EffectiveRank",
    "Generation",
    "KLMixin",
    "Predictive",
    "RegressionPredictive",
    "StreamedToken",
    "Threshold",
    "calibrate_gates",
    "calibrate_threshold",
    "effective_rank",
    "elbo_loss",
    "evaluate",
    "gaussian_nll",
    "generate",
    "generate_stream",
    "kl_loss",
    "kl_terms",
    "multiple_choice",
    "predict",
    "sampling",
    "set_progress",
]
