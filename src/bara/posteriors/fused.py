"""The fused step: what layers have alike is computed once for all of them, the rest as one node.

A step of a Bayesian adapter costs by the number of its small operations, not by their size. So
what does not depend on the input (casts, random numbers, multipliers) is made for all layers of an
adapter at once, in stacks. A layer,

    result + B f(A x, A' (x * c)),

is a product with B and one node of autograd, which layers with the same x share and whose backward
pass is written out (`siblings`). A family says what f is (`RankFunction`) and what goes into it
(`Posterior.fuse`). Layers that cannot be fused go through `Posterior.forward`, which does the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bara.draws.noise_stack import FreshNoiseStack, NoiseStack
from bara.posteriors.rank_functions import RankFunction, Signed
from bara.posteriors.rank_space import SharedInput, wide
from bara.posteriors.siblings import Siblings


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
        siblings: the layers' numbers, in order, those together that read the same input and whose
            A have the same shape.
    """

    posteriors: Sequence[nn.Module]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scalings: Sequence[float]
    noise: NoiseStack
    dtype: torch.dtype
    with_kl: bool
    siblings: Sequence[Sequence[int]]

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
    """One layer of a fused pass.

    Attributes:
        siblings: it and those that read the same input.
        place: its number among these.
        b: B in the projections' precision, multiplied by LoRA's scaling.
        parts: what its KL is made of and no input changes, by name.
    """

    siblings: Siblings
    place: int
    b: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)

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
        y, part = self.siblings.of(self.place, x, rows, weights)
        flat = result.reshape(-1, result.shape[-1]).to(self.b.dtype)
        out = torch.addmm(flat, y.view(-1, y.shape[-1]), self.b.mT).view(result.shape)
        if part is None:
            return out, self.parts
        assert self.siblings.function.part is not None
        parts = {**self.parts, self.siblings.function.part: part}
        if weights is not None and part.shape[1] > 1:
            parts["weights"] = weights
        return out, parts


def stacked_layers(stack: Stack, fused: Fused) -> list[FusedLayer]:
    """The layers of a stack, with both weights in the projections' precision."""
    b = list(stack.b)
    for layers, weights in stack.stacks_of_b:
        scalings = {stack.scalings[i] for i in layers}
        scaling: Any = scalings.pop()
        if scalings:  # not the same everywhere
            scaling = weights.new_tensor([stack.scalings[i] for i in layers]).view(-1, 1, 1)
        put(b, layers, (weights * (scaling * fused.scale)).to(stack.dtype))
    parts = {name: part.unbind() for name, part in fused.parts.items()}
    prepared = {
        i: FusedLayer(siblings, place, b[i], {name: part[i] for name, part in parts.items()})
        for layers, siblings in _siblings(stack, fused)
        for place, i in enumerate(layers)
    }
    return [prepared[i] for i in range(len(b))]


def _siblings(stack: Stack, fused: Fused) -> Iterator[tuple[Sequence[int], Siblings]]:
    """The layers' numbers, those together that read the same, and what they do."""
    together = stack.siblings if fused.mask is None else [[i] for i in range(len(stack.a))]
    of_shape = {i: n for n, (layers, _) in enumerate(stack.stacks_of_a) for i in layers}
    tensors = [tensor.split([len(layers) for layers in together]) for tensor in fused.tensors]
    blocks: list[Iterator[tuple[Tensor, tuple[Tensor, ...]]]] = []
    for n, (_, weights) in enumerate(stack.stacks_of_a):
        rank = weights.shape[1]
        rows = [len(layers) * rank for layers in together if of_shape[layers[0]] == n]
        cast = weights.to(stack.dtype)
        squares: Sequence[tuple[Tensor, ...]] = [()] * len(rows)
        if fused.squares:
            # the square of an activation can be too large for float16
            square = cast.float() if stack.dtype == torch.float16 else cast
            squares = [(part,) for part in (square * square.detach()).flatten(0, 1).split(rows)]
        blocks.append(zip(cast.flatten(0, 1).split(rows), squares, strict=True))
    for number, layers in enumerate(together):
        a, squared = next(blocks[of_shape[layers[0]]])
        siblings = Siblings(
            function=fused.function,
            tensors=tuple(tensor[number] for tensor in tensors),
            a=a,
            rank=len(a) // len(layers),
            seconds=tuple(fused.second[i] for i in layers) if fused.second else squared,
            signs=tuple(fused.signs[i] for i in layers) if fused.signs else (),
            mask=None if fused.mask is None else fused.mask[layers[0]],
        )
        yield layers, siblings


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
