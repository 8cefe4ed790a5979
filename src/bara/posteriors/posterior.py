"""What every posterior family has in common: tensors in rank space in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bara.draws.draws import Noise
from bara.errors import BaraError
from bara.posteriors.config import BayesianConfig, Resolved
from bara.posteriors.fused import Fused, Stack
from bara.posteriors.rank_space import Granularity, RankSpace, wide

LOG_SCALE = 10.0
"""Fixed factor between a parameter and the logarithm or log-odds that it stands for: at LoRA's
learning rates a parameter that is one itself would hardly move."""


class ScaledGradient(torch.autograd.Function):
    """A value as it is, with a multiple of its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        """The value."""
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient times the factor."""
        return gradient * ctx.factor, None


Config = TypeVar("Config", bound=BayesianConfig, covariant=True)


@dataclass(frozen=True)
class LayerSetup(Generic[Config]):
    """What the posterior of one layer is made from.

    Attributes:
        config: what the user wrote.
        resolved: the adapter's numbers in force, shared by its layers.
        a: the new layer's A, (r, d_in, ...), which may be changed in place.
        b: its B, (d_out, r, ...).
        granularity: what adapts to what.
    """

    config: Config
    resolved: Resolved
    a: Tensor
    b: Tensor
    granularity: Granularity


class PosteriorOutput(NamedTuple):
    """What a posterior makes of one batch.

    Attributes:
        u: the multiplied rank-space activations that go into B, (B, T, r).
        kl: what `Posterior.kl` makes the KL of, by name; empty when not asked for, and for a family
            without KL.
        from_b: what the noise of B itself adds to B's output, (B, T, d_out); None without it.
    """

    u: Tensor
    kl: Mapping[str, Tensor] = {}
    from_b: Tensor | None = None


class Kl(NamedTuple):
    """KL divergences of L layers, in nats.

    Attributes:
        parameters: KL of the parameters, to be divided by N: (L,), or (L, B) if it varies by input;
            None without it.
        local: KL of what is drawn per input, (L, B); None without such variables.
        activity: P(factor k is active) per input, averaged over its positions, (L, B, r) or (L, r);
            None for a family without gates.
    """

    parameters: Tensor | None
    local: Tensor | None = None
    activity: Tensor | None = None

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Kl:
        """The KL that layers have computed themselves."""
        return cls(**parts)


class Posterior(nn.Module):
    """A posterior over one layer's adapter. Subclasses hold its parameters.

    Attributes:
        rank: r, the number of factors.
        config, resolved, granularity: see `LayerSetup`.
        calibrated: the average of `input_dependence` over data, which stands for the input where
            an adapter has to do without it (merging, export); None before `bara.calibrate_gates`.
    """

    config: BayesianConfig

    def __init__(self, setup: LayerSetup[BayesianConfig]) -> None:
        super().__init__()
        self.rank = setup.a.shape[0]
        self.config = setup.config
        self.resolved = setup.resolved
        self.granularity = setup.granularity
        self.calibrated: Tensor | None = None
        self._calibrated_with: list[tuple[Tensor, Tensor]] = []

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        """Applies a draw of the posterior, or its mean when `noise` is None.

        The layer calls it with autocast off.

        Args:
            space: the layer's rank-space activations.
            noise: source of this layer's random numbers; None for the posterior mean.
            with_kl: also hand up what the KL divergences and the activity are made of.
        """
        raise NotImplementedError

    def fuse(self, stack: Stack) -> Fused | None:
        """What `forward` does with noise, for L layers alike of which this is one, prepared.

        Returns:
            None if this family or these options have no fused step.
        """
        return None

    def parameter(self, name: str, stack: Stack | None = None) -> Tensor:
        """A parameter, float32 or wider: this layer's, (...), or a stack's, (L, ...)."""
        return wide(getattr(self, name)) if stack is None else stack.parameter(name)

    def start_again(self) -> None:
        """Puts what has not been trained yet where it starts by the numbers that are in force."""

    def kl(self, parts: Mapping[str, Tensor]) -> Kl:
        """The KL of L layers alike, of which this is one.

        Computed once for all layers: for few numbers the time goes into the calls.

        Args:
            parts: the layers' `PosteriorOutput.kl`, stacked along a new first dimension.
        """
        return Kl.of(parts)

    def open_probability(self, space: RankSpace) -> Tensor:
        """P(factor k is active), (B, 1 or T, r); all ones for a family without gates."""
        return space.u.new_ones(space.u.shape[0], 1, space.u.shape[-1], dtype=torch.float32)

    def open_draw(self, space: RankSpace, noise: Noise) -> Tensor:
        """Which factors are active in the draws of `noise`, boolean, (B, 1 or T, r)."""
        u = space.u
        return torch.ones(u.shape[0], 1, u.shape[-1], dtype=torch.bool, device=u.device)

    def input_dependence(self, space: RankSpace) -> Tensor | None:
        """What depends on the input, averaged over the batch; None if nothing does.

        The mean multipliers (r,) of BaRA's gates, BaLoRA's noise level (1,).
        """
        return None

    def mean_scale(self) -> Tensor | None:
        """The constants (r,) by which the mean mode multiplies B's columns; None for ones.

        Raises:
            BaraError: the mean depends on the input, so that no constants reproduce it.
        """
        raise NotImplementedError

    def lora_draw(self, a: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        """A draw of the posterior as plain LoRA, what depends on the input at its average.

        Args:
            a: the weight of A.
            noise: random numbers of one draw.

        Returns:
            The draw's weight of A, and the constants (r,) for B's columns, None for ones.

        Raises:
            BaraError: something depends on the input and was not calibrated.
        """
        raise BaraError(f"{type(self).__name__} has no draws that are plain LoRA adapters.")

    def calibrate(self, average: Tensor, a: Tensor) -> None:
        """Keeps an average of `input_dependence`, for as long as the adapter stays what it is.

        Args:
            average: over data.
            a: the weight of A.
        """
        self.calibrated = average
        self._calibrated_with = [(now, now.detach().clone()) for now in (a, *self.parameters())]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.calibrated = None  # what it was averaged over is another's
        super()._load_from_state_dict(*args, **kwargs)

    def _calibrated(self) -> Tensor:
        # PEFT's hot-swap writes into .data, which no hook and no version counter of torch sees
        if any(not torch.equal(now, then.to(now)) for now, then in self._calibrated_with):
            self.calibrated = None
        if self.calibrated is None:
            raise BaraError(
                "An adapter that depends on the input has no exact plain or merged form: keep it "
                "as it is, or give calibration inputs (bara.calibrate_gates(model, data); in an "
                "export, data or --data), over which what depends on the input is averaged."
            )
        return self.calibrated


def refuse_grouped(setup: LayerSetup[Any], title: str) -> None:
    """Raises BaraError for a grouped convolution, in a family with a matrix between B and A."""
    if setup.b.shape[1] != setup.a.shape[0]:
        raise BaraError(
            f"{title} mixes a layer's factors, which a grouped convolution keeps apart: leave it "
            "out of target_modules."
        )


def gaussian_draw(a: Tensor, std: Tensor, noise: Noise) -> Tensor:
    """One draw of A whose elements have the standard deviations `std`, in the shape of A."""
    return a + (std * noise.normal("A", tuple(a.shape))[0]).to(a.dtype)
