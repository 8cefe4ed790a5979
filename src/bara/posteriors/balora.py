"""BaLoRA: LoRA whose A has input-adaptive Gaussian noise (arXiv 2605.08110; design 2.2).

    q(A | x) = N(theta_A, alpha_l(x) theta_A^2),    prior N(0, c theta_A^2),  c = p / (1 - p)

sampled in rank space, where A x has mean theta_A x and variance alpha_l(x) (theta_A^2)(x^2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from bara.draws.draws import Noise
from bara.posteriors.balora_step import LEAST_ALPHA, BaloraStep
from bara.posteriors.config import About, BayesianConfig
from bara.posteriors.distributions import scale_noise_kl
from bara.posteriors.fused import Fused, Stack
from bara.posteriors.kernels.on_device import on_device
from bara.posteriors.posterior import (
    LOG_SCALE,
    Kl,
    LayerSetup,
    Posterior,
    PosteriorOutput,
    gaussian_draw,
)
from bara.posteriors.rank_space import RankSpace, position_mean, rms_normalised, wide
from bara.posteriors.registry import register


@dataclass
class BaloraConfig(BayesianConfig):
    """BaLoRA: LoRA with input-adaptive Gaussian noise on A (arXiv 2605.08110, design 2.2).

    Its mean is exactly a LoRA adapter and merges exactly.
    """

    UNUSED = ("local_kl_weight",)

    kl_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of KL_global / N, >= 0. The KL counts every element of A, so that "
            "at 1, the ELBO, few examples hold alpha at the prior's c for every input."
        },
    )
    dropout_prior: float = field(
        default=0.5,
        metadata={
            "help": "The dropout rate p in (0, 1) whose noise is the prior: relative variance "
            "c = p / (1 - p)."
        },
    )
    init_noise: float | None = field(
        default=None,
        metadata={"help": "Where the relative variance alpha > 0 starts; None for the prior's c."},
    )
    hidden_size: int = field(
        default=16,
        metadata={"help": "Width >= 1 of the network that maps an input to its alpha."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_real("dropout_prior", low=0, high=1, strict=True)
        self._require_real("init_noise", low=0, strict=True, optional=True)
        self._require("hidden_size", self.hidden_size, self.hidden_size >= 1, "an integer >= 1")

    @property
    def noise_prior(self) -> float:
        """c = p / (1 - p), the prior variance relative to the squared mean."""
        return self.dropout_prior / (1 - self.dropout_prior)


class BaloraPosterior(Posterior):
    """The network behind one layer's noise level alpha_l(x): one hidden layer of tanh units.

    Its features are the layer's pooled rank-space activations with the gradient stopped: they cost
    nothing, and the network cannot bend A to lower the noise.
    """

    config: BaloraConfig

    def __init__(self, setup: LayerSetup[BaloraConfig]) -> None:
        super().__init__(setup)
        config = setup.config
        hidden, output = nn.Linear(self.rank, config.hidden_size), nn.Linear(config.hidden_size, 1)
        start = config.noise_prior if config.init_noise is None else config.init_noise
        # not as modules: PEFT swaps adapters by names that are one part long
        self.hidden_weight, self.hidden_bias = hidden.weight, hidden.bias
        self.output_weight = nn.Parameter(torch.zeros_like(output.weight))
        bias = torch.full_like(output.bias, math.log(math.expm1(start)) / LOG_SCALE)
        self.output_bias = nn.Parameter(bias)

    def alpha(self, space: RankSpace) -> Tensor:
        """The noise level, (B, 1 or T, 1), positive."""
        features = rms_normalised(space.pooled(self.granularity).detach())
        features = features.to(self.hidden_weight.dtype)
        hidden = torch.tanh(linear(features, self.hidden_weight, self.hidden_bias))
        raw = linear(hidden, self.output_weight, self.output_bias)
        return softplus(LOG_SCALE * wide(raw)) + LEAST_ALPHA

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        if noise is None and not with_kl:
            return PosteriorOutput(space.u)
        alpha, u = self.alpha(space), space.u
        if noise is not None:
            u = space.with_relative_noise(alpha, noise).to(u.dtype)
        if not with_kl:
            return PosteriorOutput(u)
        parts = {"alpha": alpha, "elements": alpha.new_tensor(space.a.numel())}
        if space.weights is not None and alpha.shape[1] > 1:
            parts["weights"] = space.weights
        return PosteriorOutput(u, parts)

    def fuse(self, stack: Stack) -> Fused:
        root = math.sqrt(self.rank)  # features of norm 1 here, of root mean square 1 there
        tensors = [
            stack.noise.normal("A", (self.rank,)).unsqueeze(2),
            stack.parameter("hidden_weight") * root,
            stack.parameter("hidden_bias"),
            stack.parameter("output_weight") * LOG_SCALE,
            stack.parameter("output_bias") * LOG_SCALE,
        ]
        elements = tensors[0].new_tensor([a.numel() for a in stack.a])
        step = BaloraStep(pool=self.granularity == "sequence")
        step = on_device(step, "balora", tensors, stack.dtype)
        return Fused(step, tensors, {"elements": elements}, squares=True)

    def kl(self, parts: Mapping[str, Tensor]) -> Kl:
        of_element = scale_noise_kl(parts["alpha"].squeeze(-1), self.config.noise_prior)
        per_input = position_mean(of_element, parts.get("weights"), dim=2)
        return Kl(parts["elements"].unsqueeze(1) * per_input)

    def input_dependence(self, space: RankSpace) -> Tensor | None:
        return space.mean_over_positions(self.alpha(space)).mean(dim=0)

    def mean_scale(self) -> Tensor | None:
        return None

    def lora_draw(self, a: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        std = self._calibrated().sqrt() * wide(a).abs()
        return gaussian_draw(a, std, noise), None


register(
    BaloraConfig,
    BaloraPosterior,
    About(
        name="balora",
        title="BaLoRA",
        summary="input-adaptive Gaussian noise on A",
        random="A",
        paper="arXiv 2605.08110",
    ),
)
