"""`BaloraStep` in Triton: one launch each way, in place of 11 and 14 small operations."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bara.posteriors import balora_step
from bara.posteriors.balora_step import BaloraStep
from bara.posteriors.kernels import blocks
from bara.posteriors.kernels.blocks import direction, mean, read, times, write
from bara.posteriors.rank_functions import Gradients, Saved

LEAST_ALPHA = tl.constexpr(balora_step.LEAST_ALPHA)


@triton.jit
def _of_layer(
    weight, bias, output, constant, layer,
    R: tl.constexpr, W: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """A layer's network: W (V, W), b and w (1, V), and c."""
    matrix = read(weight, layer * H * R, H, 0, R, W, V)
    first, last = read(bias, layer * H, 1, 0, H, V, 1), read(output, layer * H, 1, 0, H, V, 1)
    return matrix, first, last, tl.load(constant + layer)


@triton.jit
def _network(features, weight, bias, output, constant, R: tl.constexpr, POOL: tl.constexpr):
    """n, the hidden units, w tanh(W n + b) + c, and alpha, the last two (N, 1)."""
    n, _norm = direction(features, R)
    hidden = 2.0 * tl.sigmoid(2.0 * (times(n, tl.trans(weight), POOL) + bias)) - 1.0
    raw = tl.sum(hidden * output, axis=1)[:, None] + constant
    small = tl.exp(tl.minimum(raw, 20.0))
    sum_of = 1.0 + small
    # log(1 + z) as precise for z near 0; the divisor is not 0 where it counts
    precise = small * tl.log(sum_of) / tl.maximum(sum_of - 1.0, 1e-9)
    softplus = tl.where(raw > 20.0, raw, tl.where(sum_of == 1.0, small, precise))
    return n, hidden, raw, softplus + LEAST_ALPHA


@triton.jit
def _unit_gradients(
    gradient, program, dalpha, n, hidden, raw, output,
    H: tl.constexpr, R: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the network's W, w, b and c side by side, as one program's sum."""
    draw = dalpha * tl.where(raw > 20.0, 1.0, tl.sigmoid(raw))
    dhidden = draw * output * (1.0 - hidden * hidden)
    if POOL:
        dweight = tl.trans(dhidden) * n
    else:
        dweight = tl.dot(tl.trans(dhidden), n, input_precision="ieee")
    place = program * (H * (R + 2) + 1)
    write(gradient, dweight, place, H, 0, R)
    write(gradient, tl.sum(draw * hidden, axis=0)[None, :], place + H * R, 1, 0, H)
    write(gradient, tl.sum(dhidden, axis=0)[None, :], place + H * (R + 1), 1, 0, H)
    write(gradient, tl.sum(draw, axis=0)[None, :], place + H * (R + 2), 1, 0, 1)


@triton.jit(do_not_specialize=["inputs", "positions", "span"])
def _forward(
    u, s, e, weight, bias, output, constant, weights, y, part, inputs, positions, span,
    R: tl.constexpr, W: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    POOL: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    row, begin = tl.program_id(0), tl.program_id(1) * span
    first, layer = row * positions * R, row // inputs
    e = read(e, row * R, 1, 0, R, W, 1)
    weight, bias, output, constant = _of_layer(weight, bias, output, constant, layer, R, W, H, V)
    if POOL:
        features = mean(u, weights, first, row % inputs * positions, positions, R, W, N, WEIGHTED)
        _n, _hidden, _raw, alpha = _network(features, weight, bias, output, constant, R, POOL)
        write(part, alpha, row, 1, 0, 1)
    for start in range(begin, begin + span, N):
        plain = read(u, first, positions, start, R, W, N)
        if not POOL:
            _n, _hidden, _raw, alpha = _network(plain, weight, bias, output, constant, R, POOL)
            write(part, alpha, row * positions, positions, start, 1)
        level = tl.sqrt(read(s, first, positions, start, R, W, N) * alpha)
        write(y, plain + level * e, first, positions, start, R)


@triton.jit(do_not_specialize=["inputs", "positions", "span"])
def _backward(
    dy, dpart, u, s, e, weight, bias, output, constant, weights, ds, gradient,
    inputs, positions, span,
    R: tl.constexpr, W: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    POOL: tl.constexpr, WEIGHTED: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    begin, program = block * span, row * tl.num_programs(1) + block
    first, layer = row * positions * R, row // inputs
    e = read(e, row * R, 1, 0, R, W, 1)
    weight, bias, output, constant = _of_layer(weight, bias, output, constant, layer, R, W, H, V)
    if POOL:
        features = mean(u, weights, first, row % inputs * positions, positions, R, W, N, WEIGHTED)
        n, hidden, raw, alpha = _network(features, weight, bias, output, constant, R, POOL)
        dalpha = tl.zeros((1, 1), tl.float32)
    for start in range(begin, begin + span, N):
        if not POOL:
            plain = read(u, first, positions, start, R, W, N)
            n, hidden, raw, alpha = _network(plain, weight, bias, output, constant, R, POOL)
        variance = read(s, first, positions, start, R, W, N)
        row_of = start + tl.arange(0, N)[:, None]
        inside = (row_of < positions) & (tl.arange(0, W)[None, :] < R)
        level = tl.sqrt(tl.where(inside, variance * alpha, 1.0))
        # twice the gradient of s alpha
        of_variance = read(dy, first, positions, start, R, W, N) * e / level
        write(ds, of_variance * alpha, first, positions, start, R)
        of_alpha = tl.sum(of_variance * variance, axis=1)[:, None] / 2.0
        if POOL:
            dalpha += tl.sum(of_alpha, axis=0)[None, :]
        else:
            if PART:
                of_alpha += read(dpart, row * positions, positions, start, 1, 1, N)
            _unit_gradients(gradient, program, of_alpha, n, hidden, raw, output, H, R, POOL)
    if POOL:
        if PART:
            dalpha += tl.load(dpart + row)
        _unit_gradients(gradient, program, dalpha, n, hidden, raw, output, H, R, POOL)


@dataclass(frozen=True)
class BaloraKernel(BaloraStep):
    """BaLoRA's rank function by these kernels."""

    def forward(
        self, u: Tensor, s: Tensor | None, weights: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Saved]:
        e, weight, bias, output, constant = (tensor.contiguous() for tensor in tensors)
        weights = None if weights is None or u.shape[-2] == 1 else weights.contiguous()
        saved = u, s, e, weight, bias, output, constant, weights
        y = torch.empty_like(u)
        alpha = e.new_empty(*u.shape[:2], 1 if self.pool else u.shape[-2], 1)
        grid, sizes = self._sizes(saved)
        blocks.launch(_forward, grid, *saved, y, alpha, **sizes)
        return y, alpha, saved

    def backward(
        self, saved: Saved, dy: Tensor, dpart: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        u, s, e, weight, *_ = saved
        layers, hidden, rank = weight.shape
        ds = torch.empty_like(s)
        grid, sizes = self._sizes(saved)
        gradient = e.new_empty(layers, u.shape[1] * grid[1], hidden * (rank + 2) + 1)
        dpart = None if dpart is None else dpart.contiguous()
        given = dy.contiguous(), dpart, *saved, ds, gradient
        blocks.launch(_backward, grid, *given, **sizes, PART=dpart is not None)
        dweight, doutput, dbias, dconstant = gradient.sum(1).split(
            [hidden * rank, hidden, hidden, 1], dim=1
        )
        of_network = dweight.view_as(weight), dbias, doutput.unsqueeze(1), dconstant
        return dy, ds, (None, *of_network)

    def _sizes(self, saved: Saved) -> tuple[tuple[int, int], dict[str, Any]]:
        u, _, _, weight, *_, weights = saved
        hidden = weight.shape[1]
        grid, sizes = blocks.grid_and_sizes(u, weights, self.pool, max(u.shape[-1], hidden))
        return grid, {**sizes, "H": hidden, "V": blocks.width(hidden)}


def kernel(step: BaloraStep) -> BaloraStep:
    """The same function by these kernels."""
    return BaloraKernel(step.pool)


def example(
    step: BaloraStep, normal: Callable[..., Tensor], layers: int, inputs: int, widths: Sequence[int]
) -> list[Tensor]:
    """Tensors of random numbers as the step's are, of these last dimensions."""
    rank, _, hidden, *_ = widths
    e, weight = normal(layers, inputs, 1, rank), normal(layers, hidden, rank)
    return [e, weight, normal(layers, hidden), normal(layers, 1, hidden), normal(layers, 1)]
