"""MC-dropout on the adapter's inputs (Gal and Ghahramani 2016, arXiv 1506.02142).

One mask over the input features belongs to an input and a draw and is shared by its tokens, so
that a draw is one thinned adapter (Gal and Ghahramani 2016, arXiv 1512.05287).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from bara.draws.draws import Noise
from bara.draws.noise_stack import FreshNoiseStack
from bara.posteriors.config import About, BayesianConfig
from bara.posteriors.fused import Fused, Stack, put
from bara.posteriors.posterior import Posterior, PosteriorOutput
from bara.posteriors.rank_functions import Plain
from bara.posteriors.rank_space import RankSpace, trailing
from bara.posteriors.registry import register


@dataclass
class McDropoutConfig(BayesianConfig):
    """MC-dropout: dropout on the adapter's inputs that stays on in prediction (arXiv 1506.02142).

    Its mean is exactly a LoRA adapter and merges exactly. There is no KL: give a weight decay to
    the optimiser for a Gaussian prior.
    """

    HAS_KL = False
    UNUSED = ("kl_weight", "local_kl_weight", "strength", "warmup", "granularity")

    dropout_rate: float = field(
        default=0.1, metadata={"help": "Probability in (0, 1) that a feature is dropped."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_real("dropout_rate", low=0, high=1, strict=True)


class McDropoutPosterior(Posterior):
    """Has no parameters: the rate is fixed, and weight decay stands for the prior."""

    config: McDropoutConfig

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        if noise is None:
            return PosteriorOutput(space.u)
        x = space.x
        channel = -1 if space.a.dim() == 2 else 1
        mask = self._mask(x.shape[channel], noise)
        mask = mask.unsqueeze(1) if channel == -1 else trailing(mask, x.dim())
        x = (x * mask.to(x.dtype)).to(space.u.dtype)
        return PosteriorOutput(space.project(x, space.a.to(x.dtype)))

    def fuse(self, stack: Stack) -> Fused | None:
        if not isinstance(stack.noise, FreshNoiseStack):
            return None
        rate, masks = self.config.dropout_rate, list(stack.a)
        for layers, weights in stack.stacks_of_a:
            uniform = stack.noise.uniform_of(len(layers), weights.shape[-1:])
            put(masks, layers, uniform.ge(rate).to(stack.dtype).unsqueeze(2))
        return Fused(Plain(), mask=masks, scale=1 / (1 - rate))

    def mean_scale(self) -> Tensor | None:
        return None

    def _mask(self, features: int, noise: Noise) -> Tensor:
        """What each input feature is multiplied by, (B, features): 0, or 1 / (1 - rate)."""
        rate = self.config.dropout_rate
        return noise.uniform("mask", (features,)).ge(rate) / (1 - rate)

    def lora_draw(self, a: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        mask = self._mask(a.shape[1], noise)[0]
        return a * trailing(mask, a.dim() - 1).to(a.dtype), None


register(
    McDropoutConfig,
    McDropoutPosterior,
    About(
        name="mc-dropout",
        title="MC-dropout",
        summary="dropout on the adapter's inputs that stays on",
        random="inputs of A that are dropped",
        paper="arXiv 1506.02142",
    ),
)
