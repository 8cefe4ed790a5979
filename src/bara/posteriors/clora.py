"""C-LoRA: a small matrix between B and A that depends on the input (arXiv 2505.17773).

    y = W0 x + s B E(x) A x,    E_ij(x) ~ N(m_ij(A x), sigma(g_ij(A x))^4),    prior N(0, beta^2)

with m and g of one network, and sigma the logistic function. A and B are deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bara.draws.draws import Noise
from bara.errors import BaraError
from bara.posteriors.config import About, BayesianConfig
from bara.posteriors.distributions import gaussian_kl
from bara.posteriors.posterior import LayerSetup, Posterior, PosteriorOutput, refuse_grouped
from bara.posteriors.rank_space import RankSpace, position_mean, wide
from bara.posteriors.registry import register

LEAST_STD = 1e-6
"""Least standard deviation, so that its logarithm is finite."""


@dataclass
class CloraConfig(BayesianConfig):
    """C-LoRA: a random matrix between B and A that depends on the input (arXiv 2505.17773).

    Its mean depends on the input too, so that there is no merged form.
    """

    POSITIVE = ("prior_std",)
    UNUSED = ("local_kl_weight",)

    kl_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of KL / N, >= 0. The KL counts the r^2 elements of every layer's "
            "matrix, averaged over the positions of an input."
        },
    )
    prior_std: float = field(
        default=0.2, metadata={"help": "beta > 0, the standard deviation of the prior on E."}
    )
    hidden_size: int = field(
        default=64, metadata={"help": "Width >= 1 of the network that maps A x to E."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("hidden_size", self.hidden_size, self.hidden_size >= 1, "an integer >= 1")


class CloraPosterior(Posterior):
    """The network behind one layer's E(x): one hidden layer of rectified units."""

    config: CloraConfig

    def __init__(self, setup: LayerSetup[CloraConfig]) -> None:
        super().__init__(setup)
        refuse_grouped(setup, "C-LoRA")
        config = setup.config
        hidden = nn.Linear(self.rank, config.hidden_size)
        output = nn.Linear(config.hidden_size, 2 * self.rank**2)
        # not as modules: PEFT swaps adapters by names that are one part long
        self.hidden_weight, self.hidden_bias = hidden.weight, hidden.bias
        self.output_weight, self.output_bias = output.weight, output.bias

    def matrix(self, space: RankSpace) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of E's elements, (B, 1 or T, r^2) each."""
        features = wide(space.pooled(self.granularity))
        hidden = linear(features, wide(self.hidden_weight), wide(self.hidden_bias)).relu()
        mean, root = linear(hidden, wide(self.output_weight), wide(self.output_bias)).chunk(2, -1)
        return mean, torch.sigmoid(root).square() + LEAST_STD

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        mean, std = self.matrix(space)
        element = mean
        if noise is not None:
            element = mean + std * noise.normal("E", (self.rank**2,)).unsqueeze(1)
        matrix = element.unflatten(-1, (self.rank, self.rank))
        u = (matrix @ space.wide_u.unsqueeze(-1)).squeeze(-1).to(space.u.dtype)
        if not with_kl:
            return PosteriorOutput(u)
        kl = gaussian_kl(mean, std, self.config.prior_std)
        weights = space.weights if mean.shape[1] > 1 else None
        return PosteriorOutput(u, {"parameters": position_mean(kl, weights, dim=1).sum(-1)})

    def input_dependence(self, space: RankSpace) -> Tensor | None:
        """Mean and standard deviation of E's elements, (2 r^2,)."""
        return space.mean_over_positions(torch.cat(self.matrix(space), -1)).mean(dim=0)

    def mean_scale(self) -> Tensor | None:
        raise BaraError(
            "C-LoRA has no merged form, and its mean is no plain LoRA adapter: what is between B "
            "and A is a matrix that depends on the input. Export draws (--mode draws)."
        )

    def lora_draw(self, a: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        mean, std = self._calibrated().chunk(2)
        element = mean + std * noise.normal("E", (self.rank**2,))[0].to(mean)
        matrix = element.view(self.rank, self.rank)
        return (matrix @ wide(a).flatten(1)).view(a.shape).to(a.dtype), None


register(
    CloraConfig,
    CloraPosterior,
    About(
        name="clora",
        title="C-LoRA",
        summary="a random matrix between B and A that depends on the input",
        random="the matrix between B and A",
        paper="arXiv 2505.17773",
    ),
)
