"""The fused step: what layers have alike is computed once for all of them, the rest as one node.

A step of a Bayesian adapter costs by the number of its small operations, not by their size. So
what does not depend on the input (casts, random numbers, multipliers) is made for all layers of an
adapter at once, in stacks, and each layer is a single node of autograd around both projections,

    result + B f(A x, A' (x * c)),

whose backward pass is written out. A family says what f is (`RankFunction`) and what goes into it
(`Posterior.fuse`). Layers that cannot be fused go through `Posterior.forward`, which does the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bara.draws.noise_stack import FreshNoiseStack, NoiseStack
from bara.posteriors.rank_functions import RankFunction, Signed
from bara.posteriors.rank_space import SharedInput, wide

TINY = 1e-24
"""Least variance of A's noise, so that its root has a gradient for an input of zeros."""


@dataclass(frozen=True)
class Stack:
    """L layers alike: of one adapter and device, with the same rank.

    Attributes:
        posteriors: theirs.
        a, b: their weights, (r, d_in) and (d_out, r).
        scalings: LoRA's.
        noise: their random numbers.
        dtype: of the two projections.
        with_kl: hand up what the KL is made of.
    """

    posteriors: Sequence[nn.Module]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scalings: Sequence[float]
    noise: NoiseStack
    dtype: torch.dtype
    with_kl: bool

    def parameter(self, name: str) -> Tensor:
        """A parameter of all posteriors, (L, ...), float32 or wider."""
        return wide(torch.stack([getattr(p, name) for p in self.posteriors]))

    @cached_property
    def stacks_of_a(self) -> list[tuple[list[int], Tensor]]:
        """A's weights by their shape: which layers, and the weights, (layers, r, d_in)."""
        return _by_shape(self.a)

    @cached_property
    def stacks_of_b(self) -> list[tuple[list[int], Tensor]]:
        """The same of B, (layers, d_out, r)."""
        return _by_shape(self.b)

    def squared_columns(self) -> Tensor:
        """|b_k|^2 for every layer and factor, (L, r), float32."""
        columns = list(self.b)
        for layers, weights in self.stacks_of_b:
            put(columns, layers, wide(weights).square().sum(dim=1))
        return torch.stack(columns)


class Fused(NamedTuple):
    """What a family makes of a stack.

    Attributes:
        function: what every layer does in rank space.
        tensors: what goes into it by layer, (L, ...) each; what has gradients among them too.
        parts: what the KL is made of and no input changes, by name, (L, ...) each.
        squares: the second projection is A^2 x^2, with half of its gradients.
        second: the second projection's weights, by layer, in the shape of A.
        signs: what its input is multiplied by, by layer, (B, 1, d_in).
        mask: what the input of A is multiplied by, by layer, (B, 1, d_in).
        scale: what all layers are multiplied by besides LoRA's scaling.
    """

    function: RankFunction
    tensors: Sequence[Tensor] = ()
    parts: Mapping[str, Tensor] = {}
    squares: bool = False
    second: Sequence[Tensor] | None = None
    signs: Sequence[Tensor] | None = None
    mask: Sequence[Tensor] | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class FusedLayer:
    """One layer of a fused pass; the attributes are those of `Fused`, of one layer.

    Attributes:
        a, b: the weights in the projections' precision; b is multiplied by LoRA's scaling.
    """

    function: RankFunction
    a: Tensor
    b: Tensor
    tensors: tuple[Tensor, ...] = ()
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    second: Tensor | None = None
    signs: Tensor | None = None
    mask: Tensor | None = None

    def __call__(
        self, x: SharedInput, rows: int, weights: Tensor | None, result: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The layer's output with the adapter's contribution, and what its KL is made of.

        Args:
            x: the layer's input, (..., d_in).
            rows: inputs of the batch.
            weights: what each position counts, (B, T); None for all alike.
            result: the base layer's output, (..., d_out).
        """
        dtype = self.a.dtype
        data = x.data(dtype)
        second, factor = None, None
        if self.mask is not None:
            data = (data.view(rows, -1, data.shape[-1]) * self.mask).view(data.shape)
        if self.second is not None and self.signs is not None:
            factor = self.signs
            second = (data.view(rows, -1, data.shape[-1]) * factor).view(data.shape)
        elif self.second is not None:
            second, factor = x.squared_data(self.second.dtype), data
        given = Given(rows, weights, data, self.mask, second, factor)
        weights_of = self.a, self.second, self.b
        out, part = _without_autocast(
            x.x.device.type,
            lambda: LayerStep.apply(self.function, given, x.x, result, *weights_of, *self.tensors),
        )
        if part is None:
            return out, self.parts
        assert self.function.part is not None
        parts = {**self.parts, self.function.part: part}
        if weights is not None and part.shape[1] > 1:
            parts["weights"] = weights
        return out, parts


class Given(NamedTuple):
    """What a `LayerStep` has no gradients for, or through its x: x itself in other forms.

    Attributes:
        rows: inputs of the batch, B.
        weights: what each position counts, (B, T); None for all alike.
        data: x in the projections' precision, times `mask`, (N, d_in).
        mask: (B, 1, d_in) or None.
        second: x * factor, what the second projection reads, (N, d_in) or None.
        factor: (B, 1, d_in), or (N, d_in) for x itself, of whose gradient half counts here.
    """

    rows: int
    weights: Tensor | None
    data: Tensor
    mask: Tensor | None
    second: Tensor | None
    factor: Tensor | None


class LayerStep(torch.autograd.Function):
    """result + B f(A x, A' (x * factor)) of one layer, as one node of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        function: RankFunction,
        given: Given,
        x: Tensor,
        result: Tensor,
        a: Tensor,
        second: Tensor | None,
        b: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output, and what goes into the KL."""
        shape = (given.rows, -1, a.shape[0])
        u = (given.data @ a.mT).view(shape)
        s = None
        if second is not None and given.second is not None:
            least = _least_variance(second.dtype, second.device)
            s = torch.addmm(least, given.second, second.mT).view(shape)
        y, part, saved = function.forward(u, s, given.weights, tensors)
        y = y.view(-1, a.shape[0])
        flat = result.reshape(-1, result.shape[-1]).to(b.dtype)
        out = torch.addmm(flat, y, b.mT).view(result.shape)
        ctx.function, ctx.rows, ctx.device = function, given.rows, x.device.type
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, result.dtype)
        ctx.save_for_backward(
            given.data, given.mask, given.second, given.factor, a, second, b, y, *saved
        )
        ctx.set_materialize_grads(False)
        return out, part

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dpart: Tensor | None) -> tuple[Any, ...]:
        """The gradients."""
        return _without_autocast(ctx.device, lambda: LayerStep._backward(ctx, dout, dpart))

    @staticmethod
    def _backward(ctx: Any, dout: Tensor | None, dpart: Tensor | None) -> tuple[Any, ...]:
        data, mask, data2, factor, a, second, b, y, *saved = ctx.saved_tensors
        _, _, x_needs, result_needs, a_needs, second_needs, b_needs, *_ = ctx.needs_input_grad
        by_input = (ctx.rows, -1, a.shape[1])
        if dout is None:
            dresult, db, dy = None, None, torch.zeros_like(y)
        else:
            d = dout.reshape(-1, dout.shape[-1]).to(b.dtype)
            dresult = dout.to(ctx.dtypes[1]) if result_needs else None
            db, dy = d.mT @ y if b_needs else None, d @ b
        du, ds, gradients = ctx.function.backward(saved, dy.view(ctx.rows, -1, y.shape[1]), dpart)
        du = du.view(y.shape)
        da = du.mT @ data if a_needs else None
        dsecond = dx = None
        if ds is not None:
            ds = ds.view(y.shape)
            dsecond = ds.mT @ data2 if second_needs else None
        if x_needs and ds is not None:
            dx = ds @ second
            dx = dx.mul_(factor) if factor.dim() == 2 else dx.view(by_input).mul_(factor)
            dx = dx.view(data.shape).to(a.dtype).addmm_(du, a)
        elif x_needs:
            dx = du @ a
        if dx is not None:
            dx = dx if mask is None else dx.view(by_input).mul_(mask)
            dx = dx.view(ctx.shape).to(ctx.dtypes[0])
        return None, None, dx, dresult, da, dsecond, db, *gradients


def _without_autocast(device: str, function: Callable[[], Any]) -> Any:
    """What the function returns; a context would take longer than some layers."""
    if not torch.is_autocast_enabled(device):
        return function()
    torch.set_autocast_enabled(device, False)
    try:
        return function()
    finally:
        torch.set_autocast_enabled(device, True)


def stacked_layers(stack: Stack, fused: Fused) -> list[FusedLayer]:
    """The layers of a stack, with both weights in the projections' precision."""
    count = len(stack.posteriors)
    a, b, second = list(stack.a), list(stack.b), list(fused.second or stack.a)
    for layers, weights in stack.stacks_of_a:
        cast = weights.to(stack.dtype)
        put(a, layers, cast)
        if fused.squares:
            # the square of an activation can be too large for float16
            square = cast.float() if stack.dtype == torch.float16 else cast
            put(second, layers, square * square.detach())
    for layers, weights in stack.stacks_of_b:
        scalings = {stack.scalings[i] for i in layers}
        scaling: Any = scalings.pop()
        if scalings:  # not the same everywhere
            scaling = weights.new_tensor([stack.scalings[i] for i in layers]).view(-1, 1, 1)
        put(b, layers, (weights * (scaling * fused.scale)).to(stack.dtype))
    parts = {name: part.unbind() for name, part in fused.parts.items()}
    tensors = [tensor.unbind() for tensor in fused.tensors]
    return [
        FusedLayer(
            function=fused.function,
            a=a[i],
            b=b[i],
            tensors=tuple(tensor[i] for tensor in tensors),
            parts={name: part[i] for name, part in parts.items()},
            second=second[i] if fused.squares or fused.second is not None else None,
            signs=None if fused.signs is None else fused.signs[i],
            mask=None if fused.mask is None else fused.mask[i],
        )
        for i in range(count)
    ]


def flipout(
    stack: Stack, stds: Sequence[Tensor], kl: Callable[[Tensor, Tensor], Tensor]
) -> Fused | None:
    """A Gaussian matrix besides A, as `RankSpace.project_noise` draws it in training.

    Args:
        stack: the layers.
        stds: its standard deviations, for each of `stack.stacks_of_a`, (layers, r, d_in).
        kl: the KL of the elements, of A and the standard deviations.
    """
    noise = stack.noise
    if not isinstance(noise, FreshNoiseStack):
        return None
    matrices, signs, kls = list(stack.a), list(stack.a), list(stack.a)
    for (layers, a), std in zip(stack.stacks_of_a, stds, strict=True):
        drawn = std * noise.shared(len(layers), a.shape[1:])
        put(matrices, layers, drawn.to(stack.dtype))
        of_inputs = noise.sign_of(len(layers), a.shape[-1:]).to(stack.dtype)
        put(signs, layers, of_inputs.unsqueeze(2))
        if stack.with_kl:
            put(kls, layers, kl(wide(a), std).flatten(1).sum(1))
    of_factors = noise.sign_of(len(stack.a), stack.a[0].shape[:1]).unsqueeze(2)
    parts = {"parameters": torch.stack(kls)} if stack.with_kl else {}
    return Fused(Signed(), [of_factors], parts, second=matrices, signs=signs)


def _by_shape(weights: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    shapes: dict[torch.Size, list[int]] = defaultdict(list)
    for i, weight in enumerate(weights):
        shapes[weight.shape].append(i)
    return [(layers, torch.stack([weights[i] for i in layers])) for layers in shapes.values()]


def put(target: list[Tensor], layers: Sequence[int], stacked: Tensor) -> None:
    """Puts the parts of a stack into a list at the numbers of their layers."""
    for i, tensor in zip(layers, stacked.unbind(), strict=True):
        target[i] = tensor


@cache
def _least_variance(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1,), TINY, dtype=dtype, device=device)
