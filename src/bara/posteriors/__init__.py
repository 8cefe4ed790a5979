"""The posterior families, one small file each."""

from collections.abc import Callable

from bara.posteriors.balora import BaloraPosterior
from bara.posteriors.bara import BaraPosterior
from bara.posteriors.blob import BlobPosterior
from bara.posteriors.certified import CertifiedPosterior
from bara.posteriors.config import (
    BaloraConfig,
    BaraConfig,
    BayesianConfig,
    BlobConfig,
    CertifiedConfig,
    McDropoutConfig,
    RankwiseConfig,
    ScalablConfig,
)
from bara.posteriors.mc_dropout import McDropoutPosterior
from bara.posteriors.posterior import Posterior
from bara.posteriors.rankwise import RankwisePosterior
from bara.posteriors.scalabl import ScalablPosterior

FAMILIES: dict[type[BayesianConfig], Callable[..., Posterior]] = {
    BaraConfig: BaraPosterior,
    BaloraConfig: BaloraPosterior,
    BlobConfig: BlobPosterior,
    ScalablConfig: ScalablPosterior,
    RankwiseConfig: RankwisePosterior,
    McDropoutConfig: McDropoutPosterior,
    CertifiedConfig: CertifiedPosterior,
}
"""Which posterior a config makes: called with the config, the layer's rank and the granularity."""

__all__ = ["FAMILIES", "Posterior"]
