"""What is fitted after training: a temperature, an ensemble, noise on trained weights."""

from bara.methods.ensemble import EnsembleDraws
from bara.methods.laplace import LaplaceOptions, laplace
from bara.methods.tfb import tfb
from bara.methods.weight_draws import Factors, WeightDraws
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
