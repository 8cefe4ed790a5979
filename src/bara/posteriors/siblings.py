"""f(A x, A' (x * c)) of the layers that read the same x, as one node of autograd.

Query, key and value read one input. Small projections cost what it takes to read it, and to write
its gradient, and what is done in rank space costs by the number of operations: so all of it is done
once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bara.posteriors.rank_functions import RankFunction
from bara.posteriors.rank_space import SharedInput

TINY = 1e-24
"""Least variance of A's noise, so that its root has a gradient for an input of zeros."""
InRankSpace = tuple[Tensor, Tensor | None]
"""What one layer's B reads, (B, T, r), and what goes into its KL besides, or None."""


@dataclass(frozen=True, eq=False)
class Siblings:
    """K layers that read the same input, or one.

    Attributes:
        function: f, what each of them does in rank space.
        tensors: what goes into it, by layer, (K, ...) each.
        a: A of all, in the projections' precision, (K r, d_in).
        rank: r.
        seconds: A', of all layers (K r, d_in) or of each (r, d_in).
        signs: what the input of each of `seconds` is multiplied by, (B, 1, d_in); without them that
            is x itself, of whose gradient half counts here.
        mask: what the input of A is multiplied by, (B, 1, d_in); of one layer alone.
    """

    function: RankFunction
    tensors: tuple[Tensor, ...]
    a: Tensor
    rank: int
    seconds: tuple[Tensor, ...] = ()
    signs: tuple[Tensor, ...] = ()
    mask: Tensor | None = None

    def of(self, place: int, x: SharedInput, rows: int, weights: Tensor | None) -> InRankSpace:
        """What one of the layers makes of its input: the first one computes it for all.

        Args:
            place: the layer's number among them.
            x: its input, (..., d_in).
            rows: inputs of the batch, B.
            weights: what each position counts, (B, T); None for all alike.
        """
        made = x.siblings
        if made is None or made[0] is not self:
            if place:  # it does not read what the first did
                return self._alone(place)(x, rows, weights)[0]
            made = x.siblings = self, self(x, rows, weights)
        result: InRankSpace = made[1][place]
        return result

    def __call__(self, x: SharedInput, rows: int, weights: Tensor | None) -> list[InRankSpace]:
        """What all of them make of one input."""
        data = x.data(self.a.dtype)
        if self.mask is not None:
            data = _by_input(data, rows).mul(self.mask).view(data.shape)
        if self.signs:
            read = [_by_input(data, rows).mul(sign).view(data.shape) for sign in self.signs]
        else:
            read = [x.squared_data(second.dtype) for second in self.seconds]
        factors = self.signs or (data,) * len(self.seconds)
        given = Given(rows, self.rank, weights, data, self.mask, read, factors)
        y, part = without_autocast(
            x.x.device.type,
            lambda: SiblingStep.apply(
                self.function, given, x.x, self.a, *self.seconds, *self.tensors
            ),
        )
        parts = [None] * len(y) if part is None else _unbound(part)
        return list(zip(_unbound(y), parts, strict=True))

    def _alone(self, place: int) -> Siblings:
        mine = slice(place * self.rank, (place + 1) * self.rank)
        seconds, signs = self.seconds, self.signs
        if signs:
            seconds, signs = seconds[place : place + 1], signs[place : place + 1]
        return replace(
            self,
            tensors=tuple(tensor[place : place + 1] for tensor in self.tensors),
            a=self.a[mine],
            seconds=seconds if signs else tuple(second[mine] for second in seconds),
            signs=signs,
        )


class Given(NamedTuple):
    """What a `SiblingStep` has no gradients for, or through its x: x itself in other forms.

    Attributes:
        rows: inputs of the batch, B.
        rank: r.
        weights: what each position counts, (B, T); None for all alike.
        data: x in the projections' precision, times `mask`, (N, d_in).
        mask: (B, 1, d_in) or None.
        read: x * factor, what each second projection reads, (N, d_in).
        factors: (B, 1, d_in), or (N, d_in) for x itself.
    """

    rows: int
    rank: int
    weights: Tensor | None
    data: Tensor
    mask: Tensor | None
    read: Sequence[Tensor]
    factors: Sequence[Tensor]


class SiblingStep(torch.autograd.Function):
    """f(u, s) of K layers, with u = A x and s = A' (x * factor)."""

    @staticmethod
    def forward(
        ctx: Any, function: RankFunction, given: Given, x: Tensor, a: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the layers' B read, (K, B, T, r), and what goes into the KL besides."""
        many = len(given.read)
        seconds, tensors = others[:many], others[many:]
        u, s = _by_layer(given.data @ a.mT, given), None
        if seconds:
            least = _least_variance(seconds[0].dtype, a.device)
            each = [
                torch.addmm(least, read, second.mT)
                for read, second in zip(given.read, seconds, strict=True)
            ]
            s = _by_layer(each[0], given) if many == 1 else torch.stack(each).view(u.shape)
        y, part, saved = function.forward(u, s, given.weights, tensors)
        ctx.function, ctx.rows, ctx.device = function, given.rows, x.device.type
        ctx.many, ctx.made = many, (y.shape, y.dtype)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        of_x = given.data, given.mask, *given.read, *given.factors
        ctx.save_for_backward(a, *seconds, *of_x, *saved)
        ctx.set_materialize_grads(False)
        return y, part

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dpart: Tensor | None) -> tuple[Any, ...]:
        """The gradients."""
        return without_autocast(ctx.device, lambda: SiblingStep._backward(ctx, dy, dpart))

    @staticmethod
    def _backward(ctx: Any, dy: Tensor | None, dpart: Tensor | None) -> tuple[Any, ...]:
        many = ctx.many
        a, *others = ctx.saved_tensors
        seconds, (data, mask), others = others[:many], others[many : many + 2], others[many + 2 :]
        read, factors, saved = others[:many], others[many : 2 * many], others[2 * many :]
        _, _, x_needs, a_needs, *needs = ctx.needs_input_grad
        if dy is None:
            dy = a.new_zeros(ctx.made[0], dtype=ctx.made[1])
        du, ds, gradients = ctx.function.backward(saved, dy, dpart)
        du = _side_by_side(du)
        da = du.mT @ data if a_needs else None
        dseconds: list[Tensor | None] = [None] * many
        dx = None
        if ds is not None:
            each = [_side_by_side(ds)] if many == 1 else ds.flatten(1, 2).unbind()
            for i, (second, part) in enumerate(zip(seconds, each, strict=True)):
                dseconds[i] = part.mT @ read[i] if needs[i] else None
                if x_needs:
                    term = part @ second
                    by_factor = term if factors[i].dim() == 2 else _by_input(term, ctx.rows)
                    by_factor.mul_(factors[i])
                    dx = term if dx is None else dx.add_(term)
        if x_needs:
            dx = du @ a if dx is None else dx.to(a.dtype).addmm_(du, a)
            if mask is not None:
                _by_input(dx, ctx.rows).mul_(mask)
            dx = dx.view(ctx.shape).to(ctx.dtype)
        return None, None, dx, da, *dseconds, *gradients


def _unbound(by_layer: Tensor) -> Sequence[Tensor]:
    """(B, T, r) of each layer; a lone one's without an operation."""
    return by_layer.unbind() if len(by_layer) > 1 else [by_layer.squeeze(0)]


def _by_input(flat: Tensor, rows: int) -> Tensor:
    """A view by input, (B, T, d), of (N, d)."""
    return flat.view(rows, -1, flat.shape[-1])


def _by_layer(flat: Tensor, given: Given) -> Tensor:
    """(K, B, T, r), layer by layer in memory, of (N, K r)."""
    count = flat.shape[1] // given.rank
    if count > 1:
        flat = flat.view(-1, count, given.rank).transpose(0, 1).contiguous()
    return flat.view(count, given.rows, -1, given.rank)


def _side_by_side(by_layer: Tensor) -> Tensor:
    """(N, K r) of (K, B, T, r)."""
    count, rank = by_layer.shape[0], by_layer.shape[-1]
    return by_layer.reshape(count, -1, rank).transpose(0, 1).reshape(-1, count * rank)


def without_autocast(device: str, function: Callable[[], Any]) -> Any:
    """What the function returns; a context would take longer than some layers."""
    if not torch.is_autocast_enabled(device):
        return function()
    torch.set_autocast_enabled(device, False)
    try:
        return function()
    finally:
        torch.set_autocast_enabled(device, True)


@cache
def _least_variance(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1,), TINY, dtype=dtype, device=device)
