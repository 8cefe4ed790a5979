"""What is fitted after training: a temperature, an ensemble, noise on trained weights."""

from bara.posthoc.ensemble import EnsembleDraws
from bara.posthoc.laplace import LaplaceOptions, laplace
from bara.posthoc.tfb import tfb
from bara.posthoc.weights import Factors, WeightDraws
from bara.prediction.temperature import fit_temperature, set_temperature

__all__ = [
    "EnsembleDraws",
    "Factors",
    "LaplaceOptions",
    "WeightDraws",
    "fit_temperature",
    "laplace",
    "set_temperature",
    "tfb",
]
