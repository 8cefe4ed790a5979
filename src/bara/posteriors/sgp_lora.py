"""Bayesian-LoRA: a sparse Gaussian process over the update's matrix (arXiv 2601.21003).

    W = W0 + s B U L^-1 A,    L L^T = A A^T + d^2 I,    q(U) = N(L, sigma^2),    prior N(0, 1)

A and B are the inducing columns and rows, and U (r, r) the whitened inducing variables between
them, element by element; their mean is L, so that the mean of W is plain LoRA, and A has the
prior's |A|^2 / 2. What we leave out is in docs/peers.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.linalg import cholesky, solve_triangular

from bara.draws.draws import Noise
from bara.draws.noise_stack import NoiseStack
from bara.posteriors.config import About, BayesianConfig
from bara.posteriors.distributions import gaussian_kl
from bara.posteriors.fused import Fused, Stack, put
from bara.posteriors.posterior import (
    LOG_SCALE,
    Kl,
    LayerSetup,
    Posterior,
    PosteriorOutput,
    refuse_grouped,
)
from bara.posteriors.rank_functions import Mixed
from bara.posteriors.rank_space import RankSpace, wide
from bara.posteriors.registry import register

JITTER = 0.01
"""d: keeps L invertible, also of factors that are nearly alike."""


@dataclass
class SgpLoraConfig(BayesianConfig):
    """Bayesian-LoRA: a sparse Gaussian process over the update's matrix (arXiv 2601.21003).

    Its mean is a LoRA adapter and merges exactly.
    """

    POSITIVE = ("init_noise", "max_noise")
    UNUSED = ("local_kl_weight", "granularity")

    kl_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of KL / N, >= 0. The KL counts the r^2 elements of every U."},
    )
    init_noise: float = field(
        default=1e-3, metadata={"help": "Where the standard deviation > 0 of U's elements starts."}
    )
    max_noise: float = field(
        default=0.1,
        metadata={"help": "What it cannot exceed, > 0; the prior's is 1."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        within = self.init_noise <= self.max_noise
        self._require("init_noise", self.init_noise, within, f"at most max_noise={self.max_noise}")


class SgpLoraPosterior(Posterior):
    """The standard deviations sigma of one layer's U; its mean is LoRA's own A."""

    config: SgpLoraConfig

    def __init__(self, setup: LayerSetup[SgpLoraConfig]) -> None:
        super().__init__(setup)
        refuse_grouped(setup, "Bayesian-LoRA")
        config = setup.config
        start = math.log(config.init_noise) / LOG_SCALE
        self.log_std = nn.Parameter(torch.full((self.rank, self.rank), start))

    def std(self, stack: Stack | None = None) -> Tensor:
        """sigma, (r, r), or of a stack (L, r, r)."""
        std = torch.exp(LOG_SCALE * self.parameter("log_std", stack))
        return std.clamp(max=self.config.max_noise)

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        u, std, gram = space.u, self.std(), _gram(space.a.flatten(1))
        if noise is not None:
            u = (space.wide_u @ self._mixing(std, gram, noise).mT).to(u.dtype)
        return PosteriorOutput(u, {"std": std, "gram": gram} if with_kl else {})

    def fuse(self, stack: Stack) -> Fused:
        std, grams = self.std(stack), list(stack.a)
        for layers, a in stack.stacks_of_a:
            put(grams, layers, _gram(a))
        gram = torch.stack(grams)
        mixing = self._mixing(std.unsqueeze(1), gram.unsqueeze(1), stack.noise)
        return Fused(Mixed(), [mixing], {"std": std, "gram": gram})

    def kl(self, parts: Mapping[str, Tensor]) -> Kl:
        std, gram = parts["std"], parts["gram"]
        squared_mean = gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # |L|^2, the jitter's included
        of_std = gaussian_kl(torch.zeros_like(std), std, 1.0).sum((-2, -1))
        return Kl(of_std + squared_mean / 2)

    def mean_scale(self) -> Tensor | None:
        return None

    def lora_draw(self, a: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        rows = wide(a).flatten(1)
        mixing = self._mixing(self.std(), _gram(rows), noise)[0]
        return (mixing @ rows).view(a.shape).to(a.dtype), None

    def _mixing(self, std: Tensor, gram: Tensor, noise: Noise | NoiseStack) -> Tensor:
        """U L^-1 = I + (sigma * eps) L^-1 of each input, (..., B, r, r), which multiplies A x.

        Args:
            std: (..., r, r).
            gram: L L^T in the shape of `std`.
        """
        eps = noise.normal("U", (self.rank**2,)).unflatten(-1, (self.rank, self.rank))
        identity = torch.eye(self.rank, dtype=std.dtype, device=std.device)
        return identity + solve_triangular(cholesky(gram), std * eps, upper=False, left=False)


def _gram(a: Tensor) -> Tensor:
    """L L^T = A A^T + d^2 I, (..., r, r), of A, (..., r, d_in)."""
    rows = wide(a)
    return rows @ rows.mT + JITTER**2 * torch.eye(a.shape[-2], dtype=rows.dtype, device=a.device)


register(
    SgpLoraConfig,
    SgpLoraPosterior,
    About(
        name="sgp-lora",
        title="Bayesian-LoRA",
        summary="a Gaussian on the matrix between B and A, of a sparse Gaussian process",
        random="the matrix between B and A",
        paper="arXiv 2601.21003",
    ),
)
