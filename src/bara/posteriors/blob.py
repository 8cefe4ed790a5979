"""BLoB: LoRA with a Gaussian on every element of A, B deterministic (arXiv 2406.11675).

q(A) = N(M, G^4),  sigma = G^2 (their equation 5),    prior N(0, beta^2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bara.draws.draws import Noise
from bara.posteriors.config import About, BayesianConfig
from bara.posteriors.distributions import gaussian_kl
from bara.posteriors.fused import Fused, Stack, flipout
from bara.posteriors.posterior import LayerSetup, Posterior, PosteriorOutput, gaussian_draw
from bara.posteriors.rank_space import RankSpace, wide
from bara.posteriors.registry import register


@dataclass
class BlobConfig(BayesianConfig):
    """BLoB: a Gaussian on every element of A, trained by backpropagation (arXiv 2406.11675).

    Its mean is exactly a LoRA adapter and merges exactly.
    """

    POSITIVE = ("prior_std", "init_noise")
    UNUSED = ("local_kl_weight", "granularity")

    kl_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of KL_global / N, >= 0. The KL counts every element of A: at 1, the "
            "ELBO, few examples hold most of A at the prior."
        },
    )
    prior_std: float = field(
        default=0.2, metadata={"help": "beta > 0, the standard deviation of the prior on A."}
    )
    init_noise: float = field(
        default=0.05,
        metadata={
            "help": "epsilon > 0: G starts uniformly in [epsilon / sqrt 2, epsilon], and the "
            "standard deviation is G^2."
        },
    )


class BlobPosterior(Posterior):
    """G of one layer; the mean M is LoRA's own A."""

    config: BlobConfig

    def __init__(self, setup: LayerSetup[BlobConfig]) -> None:
        super().__init__(setup)
        config = setup.config
        g = torch.empty_like(setup.a, dtype=torch.float32)
        nn.init.uniform_(g, config.init_noise / math.sqrt(2), config.init_noise)
        self.noise_root = nn.Parameter(g)

    def std(self) -> Tensor:
        """sigma = G^2, in the shape of A."""
        return wide(self.noise_root).square()

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        u, std = space.u, self.std()
        if noise is not None:
            u = u + space.project_noise(std, noise, "A").to(u.dtype)
        if not with_kl:
            return PosteriorOutput(u)
        kl = gaussian_kl(wide(space.a), std, self.config.prior_std).sum()
        return PosteriorOutput(u, {"parameters": kl})

    def fuse(self, stack: Stack) -> Fused | None:
        roots: list[Any] = [posterior.noise_root for posterior in stack.posteriors]
        stds = [
            wide(torch.stack([roots[i] for i in layers])).square()
            for layers, _ in stack.stacks_of_a
        ]
        return flipout(stack, stds, lambda a, std: gaussian_kl(a, std, self.config.prior_std))

    def mean_scale(self) -> Tensor | None:
        return None

    def lora_draw(self, a: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        return gaussian_draw(a, self.std(), noise), None


register(
    BlobConfig,
    BlobPosterior,
    About(
        name="blob",
        title="BLoB",
        summary="a Gaussian on every element of A",
        random="A",
        paper="arXiv 2406.11675",
    ),
)
