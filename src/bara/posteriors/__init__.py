"""The posterior families, one small file each."""

from collections.abc import Callable

from bara.configs import BaloraConfig, BaraConfig, BayesianConfig, CertifiedConfig
from bara.posteriors.balora import BaloraPosterior
from bara.posteriors.bara import BaraPosterior
from bara.posteriors.base import Posterior
from bara.posteriors.certified import CertifiedPosterior

FAMILIES: dict[type[BayesianConfig], Callable[..., Posterior]] = {
    BaraConfig: BaraPosterior,
    BaloraConfig: BaloraPosterior,
    CertifiedConfig: CertifiedPosterior,
}
"""Which posterior a config makes: called with the config, the layer's rank and the granularity."""

__all__ = ["FAMILIES", "Posterior"]
