"""One layer's adapter applied to one batch, seen from rank space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from bara.draws.draws import FreshNoise, Noise

Granularity = Literal["sequence", "token"]


@dataclass(frozen=True)
class Projection:
    """The operation of A, a linear map or a convolution, with any weight in the place of A's.

    Attributes:
        stride: of the convolution; None for a linear map.
        padding, dilation, groups: of the convolution.
    """

    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def channel(self) -> int:
        """The dimension of x that holds the features."""
        return -1 if self.stride is None else 1

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product, (B, T, r).

        Args:
            x: (B, T, d_in), or (B, channels, ...) for a convolution.
            weight: in the shape of A's; with one more dimension in front, a weight for every input.
        """
        if self.stride is None:
            return x @ weight.mT
        if weight.dim() == x.dim():
            return self.convolve(x, weight).flatten(2).transpose(1, 2)
        images = torch.vmap(lambda image, w: self.convolve(image.unsqueeze(0), w).squeeze(0))
        return images(x, weight).flatten(2).transpose(1, 2)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution in its own layout, (B, r, ...)."""
        convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
        return convolution(x, weight, None, self.stride, self.padding, self.dilation, self.groups)


@dataclass
class SharedInput:
    """The input of layers that read the same one (query, key, value), and what they make of it.

    Attributes:
        x: as the layers got it.
        made: what was made of it, by name and precision.
        siblings: the layers that read it together, and what they made of it.
    """

    x: Tensor
    made: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)
    siblings: tuple[Any, Any] | None = None

    def cast(self, dtype: torch.dtype) -> Tensor:
        """x in another precision."""
        if dtype == self.x.dtype:
            return self.x
        key = "x", dtype
        if key not in self.made:
            self.made[key] = self.x.to(dtype)
        return self.made[key]

    def half_squared(self, dtype: torch.dtype) -> Tensor:
        """x^2 with half of its gradient."""
        key = "square", dtype
        if key not in self.made:
            x = self.made.get(("x", dtype), self.x)
            x = x if x.dtype == dtype else x.to(dtype)
            self.made[key] = x * x.detach()
        return self.made[key]

    def data(self, dtype: torch.dtype) -> Tensor:
        """x in another precision without its gradient, (N, d_in)."""
        key = "data", dtype
        if key not in self.made:
            x = self.made.get(("x", dtype), self.x).detach()
            self.made[key] = x.to(dtype).reshape(-1, x.shape[-1])
        return self.made[key]

    def squared_data(self, dtype: torch.dtype) -> Tensor:
        """x^2 without its gradient, (N, d_in)."""
        key = "squared data", dtype
        if key not in self.made:
            self.made[key] = self.data(dtype).square()
        return self.made[key]


@dataclass(frozen=True)
class RankSpace:
    """One layer's adapter applied to one batch, seen from rank space.

    Attributes:
        u: A x, (B, T, r) with T positions (tokens, pixels) per input.
        wide_u: the same in float32 or wider.
        input: x, shared with other layers, in any layout with the same numbers as `x`.
        x: the layer's input, (B, T, d_in) or (B, channels, ...) for a convolution.
        a: the weight of A, (r, d_in) or (r, channels, kernel...).
        b: the weight of B, (d_out, r) or (d_out, r, 1, ...).
        weights: what each position counts in a mean over its row, (B, T): 0 for padding; None when
            there is no padding.
        project: A's operation.
        groups: groups of a grouped convolution, else 1.
    """

    u: Tensor
    wide_u: Tensor
    input: SharedInput
    x: Tensor
    a: Tensor
    b: Tensor
    weights: Tensor | None
    project: Projection
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
        x, shape, channel = wide(self.x), tuple(self.a.shape), self.project.channel
        if not isinstance(noise, FreshNoise):
            return self.project(x, std * noise.normal(name, shape))
        signs = noise.sign((x.shape[channel],))
        inputs = signs.unsqueeze(1) if channel == -1 else trailing(signs, x.dim())
        return self.project(x * inputs, std * noise.shared(shape)) * noise.sign(
            (shape[0],)
        ).unsqueeze(1)

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
        square = self.input.half_squared(dtype).reshape(self.x.shape)
        squared = wide(self.project(square, a * a.detach()))
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
    return F.rms_norm(features, features.shape[-1:], eps=1e-12)
