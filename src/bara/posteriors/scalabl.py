"""ScalaBL: inference over the r-dimensional diagonal between LoRA's matrices (arXiv 2506.21408).

    W = W0 + scaling B diag(s) A,    q(s) = N(mu, sigma^2),    prior N(0, prior_std^2)

A starts as the right singular vectors of LoRA's initial A, and mu as its singular values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bara.draws.draws import Noise
from bara.errors import BaraError
from bara.posteriors.config import About, BayesianConfig
from bara.posteriors.distributions import gaussian_kl
from bara.posteriors.fused import Fused, Stack
from bara.posteriors.posterior import LOG_SCALE, Kl, LayerSetup, Posterior, PosteriorOutput
from bara.posteriors.rank_functions import Multiplied
from bara.posteriors.rank_space import RankSpace, wide
from bara.posteriors.registry import register


@dataclass
class ScalablConfig(BayesianConfig):
    """ScalaBL: a Gaussian over the r-dimensional diagonal between B and A (arXiv 2506.21408).

    Its mean is a LoRA adapter and merges exactly.
    """

    POSITIVE = ("prior_std", "init_noise")
    UNUSED = ("local_kl_weight", "granularity")

    prior_std: float = field(
        default=1.0, metadata={"help": "Standard deviation > 0 of the prior on the diagonal."}
    )
    init_noise: float = field(
        default=0.05,
        metadata={"help": "Where the diagonal's standard deviation > 0 starts."},
    )


class ScalablPosterior(Posterior):
    """Mean and standard deviation of one layer's r numbers s, both positive."""

    config: ScalablConfig

    def __init__(self, setup: LayerSetup[ScalablConfig]) -> None:
        super().__init__(setup)
        config = setup.config
        matrix = wide(setup.a.detach()).flatten(1)
        if matrix.shape[0] > matrix.shape[1]:
            raise BaraError(f"ScalaBL: r = {self.rank} exceeds a layer's {matrix.shape[1]} inputs.")
        _, singular_values, vectors = torch.linalg.svd(matrix, full_matrices=False)
        with torch.no_grad():
            # machines differ in the signs: the largest element of a vector is to be positive
            largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
            vectors = vectors * largest.sign()
            setup.a.copy_(vectors.reshape(setup.a.shape))
        self.log_mean = nn.Parameter(singular_values.log())
        self.log_std = nn.Parameter(
            torch.full((self.rank,), math.log(config.init_noise) / LOG_SCALE)
        )

    def mean(self, stack: Stack | None = None) -> Tensor:
        """mu, (r,), or of a stack (L, r)."""
        return self.parameter("log_mean", stack).exp()

    def std(self, stack: Stack | None = None) -> Tensor:
        """sigma, (r,), or of a stack (L, r)."""
        return torch.exp(LOG_SCALE * self.parameter("log_std", stack))

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        mean, std = self.mean(), self.std()
        diagonal = mean
        if noise is not None:
            diagonal = mean + std * noise.normal("s", (self.rank,)).unsqueeze(1)
        u = space.u * diagonal.to(space.u.dtype)
        return PosteriorOutput(u, {"mean": mean, "std": std} if with_kl else {})

    def fuse(self, stack: Stack) -> Fused:
        mean, std = self.mean(stack), self.std(stack)
        eps = stack.noise.normal("s", (self.rank,))
        diagonal = torch.addcmul(mean[:, None], std[:, None], eps).unsqueeze(2)
        return Fused(Multiplied(), [diagonal], {"mean": mean, "std": std})

    def kl(self, parts: Mapping[str, Tensor]) -> Kl:
        return Kl(gaussian_kl(parts["mean"], parts["std"], self.config.prior_std).sum(-1))

    def mean_scale(self) -> Tensor | None:
        return self.mean()

    def lora_draw(self, a: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        return a, self.mean() + self.std() * noise.normal("s", (self.rank,))[0]


register(
    ScalablConfig,
    ScalablPosterior,
    About(
        name="scalabl",
        title="ScalaBL",
        summary="a Gaussian on the r-dimensional diagonal between B and A",
        random="the diagonal",
        paper="arXiv 2506.21408",
    ),
)
