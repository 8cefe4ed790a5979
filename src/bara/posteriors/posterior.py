"""What every posterior family has in common: tensors in rank space in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from bara.draws.draws import FreshNoise, Noise
from bara.errors import BaraError
from bara.posteriors.schedule import LossSchedule

Granularity = Literal["sequence", "token"]


@dataclass(frozen=True)
class RankSpace:
    """One layer's adapter applied to one batch, seen from rank space.

    Attributes:
        u: A x, (B, T, r) with T positions (tokens, pixels) per input.
        wide_u: the same in float32 or wider.
        x: the layer's input, (B, T, d_in) or (B, channels, ...) for a convolution.
        a: the weight of A, (r, d_in) or (r, channels, kernel...).
        b: the weight of B, (d_out, r) or (d_out, r, 1, ...).
        weights: what each position counts in a mean over its row, (B, T): 0 for padding; None when
            there is no padding.
        project: applies A's operation with another weight to another input, giving (B, T, r); a
            weight with one more dimension in front has a matrix for every input.
        half_squared_input: x^2 in a dtype, in the shape of x, with half of its gradient.
        groups: groups of a grouped convolution, else 1.
    """

    u: Tensor
    wide_u: Tensor
    x: Tensor
    a: Tensor
    b: Tensor
    weights: Tensor | None
    project: Callable[[Tensor, Tensor], Tensor]
    half_squared_input: Callable[[torch.dtype], Tensor]
    groups: int = 1

    def squared_columns(self) -> Tensor:
        """|b_k|^2 for every factor, (r,), float32."""
        b = wide(self.b).reshape(self.groups, -1, self.b.shape[1])
        return b.square().sum(dim=1).flatten()

    def project_noise(self, std: Tensor, noise: Noise, name: str) -> Tensor:
        """The input times a Gaussian matrix with standard deviations `std`, (B, T, r).

        A fixed draw is one explicit matrix for all inputs. In training one matrix serves the whole
        batch, with random signs per input that make its inputs uncorrelated (Flipout, Wen et al.
        2018, arXiv 1803.04386); an input's tokens share its signs.

        Args:
            std: standard deviations, in the shape of A.
            noise: the layer's random numbers.
            name: distinguishes several matrices of a layer.
        """
        x, shape = wide(self.x), tuple(self.a.shape)
        if not isinstance(noise, FreshNoise):
            return self.project(x, std * noise.normal(name, shape))
        channel = -1 if self.a.dim() == 2 else 1
        signs = noise.sign((x.shape[channel],))
        inputs = signs.unsqueeze(1) if channel == -1 else trailing(signs, x.dim())
        shared = std * torch.randn(shape, device=x.device)
        return self.project(x * inputs, shared) * noise.sign((shape[0],)).unsqueeze(1)

    def with_relative_noise(self, variance: Tensor | float, noise: Noise) -> Tensor:
        """A x with noise on A, where an element a of A has variance `variance` * a^2.

        One random number per input and factor is shared by the input's positions.

        Args:
            variance: relative to the squared element; broadcasts to (B, T, r).
            noise: the layer's random numbers.

        Returns:
            (B, T, r), float32 or wider.
        """
        # bfloat16 has the range of float32 and rounds a std by less than 1%; the square of
        # an activation can be too large for float16
        half = self.u.dtype == torch.bfloat16
        dtype = torch.bfloat16 if half else torch.promote_types(self.u.dtype, torch.float32)
        a = self.a.to(dtype)
        squared = wide(self.project(self.half_squared_input(dtype), a * a.detach()))
        # the root as s / sqrt(s) with a detached denominator has twice the root's gradient, which
        # makes up for the half that s carries, and clamped it is finite at 0 (an input of zeros)
        eps = noise.normal("A", (self.u.shape[-1],)).unsqueeze(1)
        constant = squared.detach().clamp_min(1e-24).rsqrt_() * eps
        if isinstance(variance, Tensor):
            return torch.addcmul(self.wide_u, squared, variance.sqrt() * constant)
        return torch.addcmul(self.wide_u, squared, constant, value=variance**0.5)

    def pooled(self, granularity: Granularity) -> Tensor:
        """The features a gate reads, float32: (B, 1, r) masked means, or (B, T, r) tokens."""
        u = self.wide_u
        if granularity == "token" or u.shape[1] == 1:
            return u
        return self.mean_over_positions(u).unsqueeze(1)

    def mean_over_positions(self, values: Tensor) -> Tensor:
        """Averages values (B, 1 or T, ...) over the positions that are not padding: (B, ...)."""
        return position_mean(values, self.weights)


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

    Made by `Family(config, rank, granularity)`.

    Attributes:
        calibrated: the average of `input_dependence` over data, which stands for the input where
            an adapter has to do without it (merging, export); None before `bara.calibrate_gates`.
        schedule: what the adapter's KL and noise follow besides the steps; None for nothing.
    """

    def __init__(self, rank: int, granularity: Granularity) -> None:
        super().__init__()
        self.rank = rank
        self.granularity = granularity
        self.calibrated: Tensor | None = None
        self.schedule: LossSchedule | None = None

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        """Applies a draw of the posterior, or its mean when `noise` is None.

        Args:
            space: the layer's rank-space activations.
            noise: source of this layer's random numbers; None for the posterior mean.
            with_kl: also hand up what the KL divergences and the activity are made of.
        """
        raise NotImplementedError

    def kl(self, parts: Mapping[str, Tensor]) -> Kl:
        """The KL of L layers alike, of which this is one.

        Computed once for all layers: for few numbers the time goes into the calls.

        Args:
            parts: the layers' `PosteriorOutput.kl`, stacked along a new first dimension.
        """
        return Kl.of(parts)

    def start(self, a: Tensor, b: Tensor) -> None:
        """Called once, for parameters in the shape of A or B.

        Args:
            a: the new layer's A, (r, d_in, ...), which may be changed in place.
            b: its B, (d_out, r, ...).
        """

    def start_values(self) -> None:
        """Called once, when the config is complete: what depends on the number of layers starts."""

    def open_probability(self, space: RankSpace) -> Tensor:
        """P(factor k is active), (B, 1 or T, r); all ones for a family without gates."""
        return space.u.new_ones(space.u.shape[0], 1, space.u.shape[-1], dtype=torch.float32)

    def open_draw(self, space: RankSpace, noise: Noise) -> Tensor:
        """Which factors are active in the draws of `noise`, boolean, (B, 1 or T, r)."""
        u = space.u
        return torch.ones(u.shape[0], 1, u.shape[-1], dtype=torch.bool, device=u.device)

    def input_dependence(self, space: RankSpace) -> Tensor | None:
        """What depends on the input, averaged over the batch; None if nothing does.

        The mean multipliers (r,) of BaRA's gates and intensities, BaLoRA's noise level (1,).
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

    def _calibrated(self) -> Tensor:
        if self.calibrated is None:
            raise BaraError(
                "An adapter that depends on the input has no exact plain or merged form: keep it "
                "as it is, or give calibration inputs (bara.calibrate_gates(model, data); in an "
                "export, data or --data), over which what depends on the input is averaged."
            )
        return self.calibrated


def relative_noise_draw(a: Tensor, variance: Tensor | float, noise: Noise) -> Tensor:
    """One draw of A whose elements have variance `variance` * a^2, in the shape of A."""
    std = variance**0.5 * wide(a).abs()
    return a + (std * noise.normal("A", tuple(a.shape))[0]).to(a.dtype)


def position_mean(values: Tensor, weights: Tensor | None, dim: int = 1) -> Tensor:
    """Averages values over the dimension `dim`, of 1 or T positions.

    Args:
        values: (B, 1 or T, ...), or with more dimensions in front.
        weights: what each position counts, (B, T) with the same dimensions in front; None for all
            alike.
        dim: the dimension of the positions.
    """
    if values.shape[dim] == 1:
        return values.squeeze(dim)
    if weights is None:
        return values.mean(dim=dim)
    return (values * trailing(weights.to(values), values.dim())).sum(dim=dim)


def trailing(values: Tensor, dim: int) -> Tensor:
    """Appends dimensions of size 1 until there are `dim`."""
    return values.reshape(*values.shape, *[1] * (dim - values.dim()))


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider: KL and gates are not to be computed in half precision."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.float()


def rms_normalised(features: Tensor) -> Tensor:
    """Divides by the root mean square over the last dimension."""
    return rms_norm(features, features.shape[-1:], eps=1e-12)
