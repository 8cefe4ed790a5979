"""What families do in rank space in a fused step: the simple functions, and what all share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

Saved = Sequence[Any]
"""Tensors, or None where there is nothing."""
Gradients = Sequence[Tensor | None]
LEAST_ROOT_MEAN_SQUARE = 1e-6
"""What features have at least, so that features of zeros have a direction."""


class RankFunction(Protocol):
    """What a family does between A and B, with its derivative.

    Attributes:
        part: the name of what goes into the KL besides; None without it.
    """

    @property
    def part(self) -> str | None: ...

    def forward(
        self, u: Tensor, s: Tensor | None, weights: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Saved]:
        """What goes into B.

        Args:
            u: A x of K layers, (K, B, T, r).
            s: the second projection, (K, B, T, r).
            weights: what the positions count, (B, T); None for all alike.
            tensors: these layers', (K, ...) each.

        Returns:
            (K, B, T, r) in u's precision, what goes into the KL, and what `backward` needs.
        """
        ...

    def backward(
        self, saved: Saved, dy: Tensor, dpart: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        """The gradients of u and s, in their precision, and of `tensors`."""
        ...


class Plain:
    """A x as it is."""

    part = None

    def forward(
        self, u: Tensor, s: Tensor | None, weights: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Saved]:
        return u, None, ()

    def backward(
        self, saved: Saved, dy: Tensor, dpart: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        return dy, None, ()


class Multiplied:
    """A x times a multiplier per input and factor, (K, B, 1, r)."""

    part = None

    def forward(
        self, u: Tensor, s: Tensor | None, weights: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Saved]:
        (multiplier,) = tensors
        return product(u, multiplier, u.dtype), None, (u, multiplier)

    def backward(
        self, saved: Saved, dy: Tensor, dpart: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        u, multiplier = saved
        gradient = product(dy, u, multiplier.dtype).sum(-2, keepdim=True)
        return product(dy, multiplier, u.dtype), None, (gradient,)


class Mixed:
    """A x times a matrix per input, (K, B, r, r)."""

    part = None

    def forward(
        self, u: Tensor, s: Tensor | None, weights: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Saved]:
        (matrix,) = tensors
        return (u.to(matrix.dtype) @ matrix.mT).to(u.dtype), None, (u, matrix)

    def backward(
        self, saved: Saved, dy: Tensor, dpart: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        u, matrix = saved
        dy_wide = dy.to(matrix.dtype)
        gradient = dy_wide.mT @ u.to(matrix.dtype)
        return (dy_wide @ matrix).to(u.dtype), None, (gradient,)


class Signed:
    """A x plus the second projection times random signs, (K, B, 1, r) (Flipout)."""

    part = None

    def forward(
        self, u: Tensor, s: Tensor | None, weights: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Saved]:
        assert s is not None
        (signs,) = tensors
        return torch.addcmul(u, s, signs, out=torch.empty_like(u)), None, (signs,)

    def backward(
        self, saved: Saved, dy: Tensor, dpart: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        (signs,) = saved
        return dy, product(dy, signs, dy.dtype), (None,)


def pooled(u: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over the positions, (K, B, 1, r), float32 or wider."""
    if u.shape[-2] == 1:
        return u
    if weights is None:
        return u.mean(-2, keepdim=True, dtype=None if u.dtype == torch.float64 else torch.float32)
    return (u * weights.unsqueeze(-1)).sum(-2, keepdim=True)


def unit(features: Tensor) -> tuple[Tensor, Tensor]:
    """features / |features| over the last dimension and that norm, float32 or wider.

    As `rms_normalised` but for the root of r.
    """
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=dtype)
    norm = torch.hypot(norm, _least_norm(features.shape[-1]))
    return features / norm, norm


@cache
def _least_norm(width: int) -> Tensor:
    return torch.tensor(LEAST_ROOT_MEAN_SQUARE * width**0.5)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a * b in the shape of a, rounded once, in one operation."""
    if a.dtype == b.dtype == dtype:
        return a * b
    return torch.mul(a, b, out=torch.empty_like(a, dtype=dtype))


def divided(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a / b in the shape of a, rounded once, in one operation."""
    return torch.div(a, b, out=torch.empty_like(a, dtype=dtype))
