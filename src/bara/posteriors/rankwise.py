"""Rank-wise variational dropout, "BayesLoRA" (arXiv 2506.22809).

    q(a_k) = N(theta_k, sigma_k^2 I),    prior p(|w|) ~ 1 / |w|

One variance belongs to a factor, so that a factor whose noise exceeds its mean is a rank that the
task does not need. B is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bara.draws.draws import Noise
from bara.posteriors.config import About, BayesianConfig
from bara.posteriors.distributions import log_uniform_kl
from bara.posteriors.fused import Fused, Stack, flipout
from bara.posteriors.posterior import (
    LOG_SCALE,
    LayerSetup,
    Posterior,
    PosteriorOutput,
    gaussian_draw,
)
from bara.posteriors.rank_space import RankSpace, trailing, wide
from bara.posteriors.registry import register


@dataclass
class RankwiseConfig(BayesianConfig):
    """Rank-wise variational dropout, also called BayesLoRA (arXiv 2506.22809).

    Its mean is exactly a LoRA adapter and merges exactly.
    """

    UNUSED = ("local_kl_weight", "granularity")

    kl_weight: float = field(
        default=0.001,
        metadata={
            "help": "Weight of KL_global / N, >= 0. The KL counts every element of A: at 1, the "
            "ELBO, few examples let noise drown every factor."
        },
    )
    init_log_variance: float = field(
        default=-8.0,
        metadata={"help": "Where log sigma^2 of the factors' noise on A starts, in [-20, 2]."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_real("init_log_variance", low=-20, high=2)


class RankwisePosterior(Posterior):
    """One layer's r variances; the mean is LoRA's own A."""

    config: RankwiseConfig

    def __init__(self, setup: LayerSetup[RankwiseConfig]) -> None:
        super().__init__(setup)
        config = setup.config
        self.log_variance = nn.Parameter(
            torch.full((self.rank,), config.init_log_variance / LOG_SCALE)
        )

    def std(self, stack: Stack | None = None) -> Tensor:
        """sigma_k, (r,), or of a stack (L, r); log sigma_k^2 is kept in [-20, 2]."""
        log_variance = LOG_SCALE * self.parameter("log_variance", stack)
        return torch.exp(log_variance.clamp(-20, 2)).sqrt()

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        u, a = space.u, wide(space.a)
        std = trailing(self.std(), a.dim()).expand_as(a)
        if noise is not None:
            u = u + space.project_noise(std, noise, "A").to(u.dtype)
        if not with_kl:
            return PosteriorOutput(u)
        return PosteriorOutput(u, {"parameters": _kl(a, std).sum()})

    def fuse(self, stack: Stack) -> Fused | None:
        std = self.std(stack).unsqueeze(2)
        stds = [std[layers].expand_as(a) for layers, a in stack.stacks_of_a]
        return flipout(stack, stds, _kl)

    def mean_scale(self) -> Tensor | None:
        return None

    def lora_draw(self, a: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        return gaussian_draw(a, trailing(self.std(), a.dim()), noise), None


def _kl(a: Tensor, std: Tensor) -> Tensor:
    """Of each element of A."""
    return log_uniform_kl(2 * std.log() - torch.log(a.square() + 1e-8))


register(
    RankwiseConfig,
    RankwisePosterior,
    About(
        name="rankwise",
        title="rank-wise variational dropout",
        summary="variational dropout with one variance per factor",
        random="A",
        paper="arXiv 2506.22809",
    ),
)
