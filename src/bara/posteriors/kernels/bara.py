"""`BaraStep` in Triton: one launch each way, in place of 12 and 17 small operations."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bara.posteriors import distributions
from bara.posteriors.bara_step import BaraStep
from bara.posteriors.kernels import blocks
from bara.posteriors.kernels.blocks import counts, direction, mean, read, times, write
from bara.posteriors.rank_functions import Gradients, Saved

LOW = tl.constexpr(distributions.LOW)
HIGH = tl.constexpr(distributions.HIGH)


@triton.jit
def _noisy(
    u, s, e, first, positions, start,
    R: tl.constexpr, W: tl.constexpr, N: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """u, u + e sqrt(s) and that root."""
    plain = read(u, first, positions, start, R, W, N)
    v, root = plain, plain
    if NOISE:
        root = tl.sqrt(read(s, first, positions, start, R, W, N))
        v = plain + e * root
    return plain, v, root


@triton.jit
def _gate(features, weight, offset, R: tl.constexpr, POOL: tl.constexpr):
    """n = features / |features|, that norm, n W + c, its sigmoid, and g."""
    n, norm = direction(features, R)
    shifted = times(n, weight, POOL) + offset
    concrete = tl.sigmoid(shifted)
    g = tl.minimum(tl.maximum(concrete * (HIGH - LOW) + LOW, 0.0), 1.0)
    return n, norm, shifted, concrete, g


@triton.jit
def _gate_gradient(dg, dpart, n, norm, concrete, g, weight, POOL: tl.constexpr):
    """The gradients of n W + c and of the features, from that of g."""
    inside = (g > 0.0) & (g < 1.0)
    dshifted = tl.where(inside, dg * (HIGH - LOW) * concrete * (1.0 - concrete), 0.0) + dpart
    dn = times(dshifted, tl.trans(weight), POOL)
    return dshifted, (dn - n * tl.sum(dn * n, axis=1)[:, None]) / norm


@triton.jit(do_not_specialize=["inputs", "positions", "span"])
def _forward(
    u, s, e, m, offset, weight, weights, y, part, inputs, positions, span,
    R: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
    GATE: tl.constexpr, NOISE: tl.constexpr, POOL: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    row, begin = tl.program_id(0), tl.program_id(1) * span
    first = row * positions * R
    e, m = read(e, row * R, 1, 0, R, W, 1), read(m, row * R, 1, 0, R, W, 1)
    if GATE:
        weight = read(weight, row // inputs * R * R, R, 0, R, W, W)
        offset = read(offset, row * R, 1, 0, R, W, 1)
    if POOL:
        features = mean(u, weights, first, row % inputs * positions, positions, R, W, N, WEIGHTED)
        _n, _norm, shifted, _concrete, g = _gate(features, weight, offset, R, POOL)
        write(part, shifted, row * R, 1, 0, R)
        m *= g
    for start in range(begin, begin + span, N):
        plain, v, _root = _noisy(u, s, e, first, positions, start, R, W, N, NOISE)
        out = v * m
        if GATE and not POOL:
            _n, _norm, shifted, _concrete, g = _gate(plain, weight, offset, R, POOL)
            write(part, shifted, first, positions, start, R)
            out *= g
        write(y, out, first, positions, start, R)


@triton.jit(do_not_specialize=["inputs", "positions", "span"])
def _backward(
    dy, dpart, u, s, e, m, offset, weight, weights, du, ds, shared, dweight,
    inputs, positions, span,
    R: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
    GATE: tl.constexpr, NOISE: tl.constexpr, POOL: tl.constexpr, WEIGHTED: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    row, begin = tl.program_id(0), tl.program_id(1) * span
    first, first_count = row * positions * R, row % inputs * positions
    e, m = read(e, row * R, 1, 0, R, W, 1), read(m, row * R, 1, 0, R, W, 1)
    dm, doffset = tl.zeros((1, W), tl.float32), tl.zeros((1, W), tl.float32)
    dw, scale = tl.zeros((W, W), tl.float32), m
    if GATE:
        weight = read(weight, row // inputs * R * R, R, 0, R, W, W)
        offset = read(offset, row * R, 1, 0, R, W, 1)
    if POOL:
        total = tl.zeros((1, W), tl.float32)
        for start in range(0, positions, N):
            _plain, v, _root = _noisy(u, s, e, first, positions, start, R, W, N, NOISE)
            total += tl.sum(read(dy, first, positions, start, R, W, N) * v, axis=0)[None, :]
        features = mean(u, weights, first, first_count, positions, R, W, N, WEIGHTED)
        n, norm, _shifted, concrete, g = _gate(features, weight, offset, R, POOL)
        dp = tl.zeros((1, W), tl.float32)
        if PART:
            dp = read(dpart, row * R, 1, 0, R, W, 1)
        doffset, dfeatures = _gate_gradient(total * m, dp, n, norm, concrete, g, weight, POOL)
        dm, dw, scale = total * g, tl.trans(n) * doffset, m * g
    for start in range(begin, begin + span, N):
        plain, v, root = _noisy(u, s, e, first, positions, start, R, W, N, NOISE)
        dout = read(dy, first, positions, start, R, W, N)
        h, dv = dout * v, dout * scale
        if POOL:
            count = counts(weights, first_count, positions, start, WEIGHTED, N)
            write(du, dv + count * dfeatures, first, positions, start, R)
        elif GATE:
            n, norm, _shifted, concrete, g = _gate(plain, weight, offset, R, POOL)
            dp = tl.zeros((N, W), tl.float32)
            if PART:
                dp = read(dpart, first, positions, start, R, W, N)
            dshifted, dplain = _gate_gradient(h * m, dp, n, norm, concrete, g, weight, POOL)
            h, dv = h * g, dv * g
            doffset += tl.sum(dshifted, axis=0)[None, :]
            dw += tl.dot(tl.trans(n), dshifted, input_precision="ieee")
            write(du, dv + dplain, first, positions, start, R)
        else:
            write(du, dv, first, positions, start, R)
        if not POOL:
            dm += tl.sum(h, axis=0)[None, :]
        if NOISE:
            write(ds, dv * e / root, first, positions, start, R)
    program = row * tl.num_programs(1) + tl.program_id(1)
    write(shared, dm, program * R, 1, 0, R)
    if GATE:
        programs = tl.num_programs(0) * tl.num_programs(1)
        write(shared, doffset, (programs + program) * R, 1, 0, R)
        write(dweight, dw, program * R * R, R, 0, R)


@dataclass(frozen=True)
class BaraKernel(BaraStep):
    """BaRA's rank function by these kernels."""

    def forward(
        self, u: Tensor, s: Tensor | None, weights: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Saved]:
        _, e, m, *gate = tensors
        offset, weight = gate or (None, None)
        given = e, m, offset, weight, weights if u.shape[-2] > 1 else None
        saved = u, s, *(None if t is None else t.contiguous() for t in given)
        y, part = torch.empty_like(u), None
        if self.gate:
            part = m.new_empty(*u.shape[:2], 1 if self.pool else u.shape[-2], u.shape[-1])
        grid, sizes = self._sizes(saved)
        blocks.launch(_forward, grid, *saved, y, part, **sizes)
        return y, part, saved

    def backward(
        self, saved: Saved, dy: Tensor, dpart: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        u, s, _, m, *_ = saved
        du, ds = torch.empty_like(u), None if s is None else torch.empty_like(s)
        layers, inputs, _, rank = u.shape
        grid, sizes = self._sizes(saved)
        _, split = grid
        shared = m.new_empty(1 + self.gate, layers, inputs, split, rank)
        dweight = m.new_empty(layers, inputs * split, rank, rank) if self.gate else None
        dpart = None if dpart is None else dpart.contiguous()
        given = dy.contiguous(), dpart, *saved, du, ds, shared, dweight
        blocks.launch(_backward, grid, *given, **sizes, PART=dpart is not None)
        of_all = (shared.sum(-2, keepdim=True) if split > 1 else shared).unbind()
        return du, ds, (None, None, *of_all, *(() if dweight is None else (dweight.sum(1),)))

    def _sizes(self, saved: Saved) -> tuple[tuple[int, int], dict[str, Any]]:
        u, s, *_, weights = saved
        grid, sizes = blocks.grid_and_sizes(u, weights, self.gate and self.pool, u.shape[-1])
        return grid, {**sizes, "GATE": self.gate, "NOISE": s is not None}


def kernel(step: BaraStep) -> BaraStep:
    """The same function by these kernels."""
    return BaraKernel(step.gate, step.noise, step.pool)


def example(
    step: BaraStep, normal: Callable[..., Tensor], layers: int, inputs: int, widths: Sequence[int]
) -> list[Tensor]:
    """Tensors of random numbers as the step's are, of these last dimensions."""
    rank = widths[0]
    e, m, offset = (normal(layers, inputs, 1, rank) for _ in range(3))
    gate = [offset, normal(layers, rank, rank)] if step.gate else []
    return [m * (distributions.HIGH - distributions.LOW), e, m, *gate]
