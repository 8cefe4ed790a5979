"""The posterior families, one small file each."""

from collections.abc import Callable

from bara.posteriors.balora import BaloraConfig, BaloraPosterior
from bara.posteriors.bara import BaraPosterior
from bara.posteriors.bara_config import BaraConfig
from bara.posteriors.blob import BlobConfig, BlobPosterior
from bara.posteriors.certified import CertifiedConfig, CertifiedPosterior
from bara.posteriors.config import BayesianConfig
from bara.posteriors.mc_dropout import McDropoutConfig, McDropoutPosterior
from bara.posteriors.posterior import Posterior
from bara.posteriors.rankwise import RankwiseConfig, RankwisePosterior
from bara.posteriors.scalabl import ScalablConfig, ScalablPosterior

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
