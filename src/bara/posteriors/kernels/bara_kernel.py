"""`BaraStep` on a GPU: one launch each way, in Triton, in place of 12 and 17 small operations.

A program takes the positions of one input in one layer: a block of them where each has gates of its
own, all of them where they share those of the sequence. Nothing but what it is given is kept for
the way back: reading that again costs less than writing down what was made of it. What programs add
up (gradients of what positions share) each writes to a place of its own, so that the order of the
sums, and with it every bit, is the same each time.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bara.posteriors import distributions, rank_functions
from bara.posteriors.bara_step import BaraStep
from bara.posteriors.rank_functions import Gradients, Saved

LOW = tl.constexpr(distributions.LOW)
HIGH = tl.constexpr(distributions.HIGH)
LEAST = tl.constexpr(rank_functions.LEAST_ROOT_MEAN_SQUARE**2)
BLOCK = 1024
"""Elements of a block of positions, at most."""


@triton.jit
def _read(tensor, first, positions, start, R: tl.constexpr, W: tl.constexpr, N: tl.constexpr):
    """N positions of one input from `start` on, (N, W), zeros outside of it."""
    row, column = start + tl.arange(0, N)[:, None], tl.arange(0, W)[None, :]
    inside = (row < positions) & (column < R)
    return tl.load(tensor + first + row * R + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(tensor, values, first, positions, start, R: tl.constexpr):
    """The other way."""
    N: tl.constexpr = values.shape[0]
    W: tl.constexpr = values.shape[1]
    row, column = start + tl.arange(0, N)[:, None], tl.arange(0, W)[None, :]
    inside = (row < positions) & (column < R)
    tl.store(tensor + first + row * R + column, values.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _noisy(
    u, s, e, first, positions, start,
    R: tl.constexpr, W: tl.constexpr, N: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """u, u + e sqrt(s) and that root."""
    plain = _read(u, first, positions, start, R, W, N)
    v, root = plain, plain
    if NOISE:
        root = tl.sqrt(_read(s, first, positions, start, R, W, N))
        v = plain + e * root
    return plain, v, root


@triton.jit
def _counts(weights, first, positions, start, WEIGHTED: tl.constexpr, N: tl.constexpr):
    """What positions count in the mean of their input, (N, 1)."""
    row = start + tl.arange(0, N)[:, None]
    if WEIGHTED:
        counts = tl.load(weights + first + row, mask=row < positions, other=0.0).to(tl.float32)
    else:
        counts = tl.where(row < positions, 1.0 / positions, 0.0)
    return counts


@triton.jit
def _square(weight, layer, R: tl.constexpr, W: tl.constexpr):
    """A layer's weights of the gates, (W, W)."""
    row, column = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
    place = weight + layer * R * R + row * R + column
    return tl.load(place, mask=(row < R) & (column < R), other=0.0)


@triton.jit
def _times(left, right, POOL: tl.constexpr):
    """left @ right; a single row is less than what tensor cores take."""
    if POOL:
        out = tl.sum(tl.trans(left) * right, axis=0)[None, :]
    else:
        out = tl.dot(left, right, input_precision="ieee")
    return out


@triton.jit
def _gate(features, weight, offset, R: tl.constexpr, POOL: tl.constexpr):
    """n = features / |features|, that norm, n W + c, its sigmoid, and g."""
    norm = tl.sqrt(tl.sum(features * features, axis=1)[:, None] + LEAST * R)
    n = features / norm
    shifted = _times(n, weight, POOL) + offset
    concrete = tl.sigmoid(shifted)
    g = tl.minimum(tl.maximum(LOW + (HIGH - LOW) * concrete, 0.0), 1.0)
    return n, norm, shifted, concrete, g


@triton.jit
def _gate_gradient(dg, dpart, n, norm, concrete, g, weight, POOL: tl.constexpr):
    """The gradients of n W + c and of the features, from that of g."""
    inside = (g > 0.0) & (g < 1.0)
    dshifted = tl.where(inside, dg * (HIGH - LOW) * concrete * (1.0 - concrete), 0.0) + dpart
    dn = _times(dshifted, tl.trans(weight), POOL)
    return dshifted, (dn - n * tl.sum(dn * n, axis=1)[:, None]) / norm


@triton.jit(do_not_specialize=["inputs", "positions", "span"])
def _forward(
    u, s, e, m, offset, weight, weights, y, part,
    inputs, positions, span,
    R: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
    GATE: tl.constexpr, NOISE: tl.constexpr, POOL: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    row, begin = tl.program_id(0), tl.program_id(1) * span
    first, first_count = row * positions * R, row % inputs * positions
    e, m = _read(e, row * R, 1, 0, R, W, 1), _read(m, row * R, 1, 0, R, W, 1)
    if GATE:
        weight = _square(weight, row // inputs, R, W)
        offset = _read(offset, row * R, 1, 0, R, W, 1)
    if POOL:
        features = tl.zeros((1, W), tl.float32)
        for start in range(0, positions, N):
            counts = _counts(weights, first_count, positions, start, WEIGHTED, N)
            plain = _read(u, first, positions, start, R, W, N)
            features += tl.sum(plain * counts, axis=0)[None, :]
        _n, _norm, shifted, _concrete, g = _gate(features, weight, offset, R, POOL)
        _write(part, shifted, row * R, 1, 0, R)
        m *= g
    for start in range(begin, begin + span, N):
        plain, v, _root = _noisy(u, s, e, first, positions, start, R, W, N, NOISE)
        out = v * m
        if GATE and not POOL:
            _n, _norm, shifted, _concrete, g = _gate(plain, weight, offset, R, POOL)
            _write(part, shifted, first, positions, start, R)
            out *= g
        _write(y, out, first, positions, start, R)


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
    e, m = _read(e, row * R, 1, 0, R, W, 1), _read(m, row * R, 1, 0, R, W, 1)
    dm, doffset = tl.zeros((1, W), tl.float32), tl.zeros((1, W), tl.float32)
    dw, scale = tl.zeros((W, W), tl.float32), m
    if GATE:
        weight = _square(weight, row // inputs, R, W)
        offset = _read(offset, row * R, 1, 0, R, W, 1)
    if POOL:
        features, total = tl.zeros((1, W), tl.float32), tl.zeros((1, W), tl.float32)
        for start in range(0, positions, N):
            counts = _counts(weights, first_count, positions, start, WEIGHTED, N)
            plain, v, _root = _noisy(u, s, e, first, positions, start, R, W, N, NOISE)
            features += tl.sum(plain * counts, axis=0)[None, :]
            dout = _read(dy, first, positions, start, R, W, N)
            total += tl.sum(dout * v, axis=0)[None, :]
        n, norm, _shifted, concrete, g = _gate(features, weight, offset, R, POOL)
        dp = tl.zeros((1, W), tl.float32)
        if PART:
            dp = _read(dpart, row * R, 1, 0, R, W, 1)
        doffset, dfeatures = _gate_gradient(total * m, dp, n, norm, concrete, g, weight, POOL)
        dm, dw, scale = total * g, tl.trans(n) * doffset, m * g
    for start in range(begin, begin + span, N):
        plain, v, root = _noisy(u, s, e, first, positions, start, R, W, N, NOISE)
        dout = _read(dy, first, positions, start, R, W, N)
        h, dv = dout * v, dout * scale
        if POOL:
            counts = _counts(weights, first_count, positions, start, WEIGHTED, N)
            _write(du, dv + counts * dfeatures, first, positions, start, R)
        elif GATE:
            n, norm, _shifted, concrete, g = _gate(plain, weight, offset, R, POOL)
            dp = tl.zeros((N, W), tl.float32)
            if PART:
                dp = _read(dpart, first, positions, start, R, W, N)
            dshifted, dplain = _gate_gradient(h * m, dp, n, norm, concrete, g, weight, POOL)
            h, dv = h * g, dv * g
            doffset += tl.sum(dshifted, axis=0)[None, :]
            dw += tl.dot(tl.trans(n), dshifted, input_precision="ieee")
            _write(du, dv + dplain, first, positions, start, R)
        else:
            _write(du, dv, first, positions, start, R)
        if not POOL:
            dm += tl.sum(h, axis=0)[None, :]
        if NOISE:
            _write(ds, dv * e / root, first, positions, start, R)
    program = row * tl.num_programs(1) + tl.program_id(1)
    _write(shared, dm, program * R, 1, 0, R)
    if GATE:
        programs = tl.num_programs(0) * tl.num_programs(1)
        _write(shared, doffset, (programs + program) * R, 1, 0, R)
        _write(dweight, dw, program * R * R, R, 0, R)


@dataclass(frozen=True)
class BaraKernel(BaraStep):
    """BaRA's rank function by these kernels; for whom `kernels.on_device` says."""

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
        launch(_forward, self._grid(u), *saved, y, part, **self._sizes(saved))
        return y, part, saved

    def backward(
        self, saved: Saved, dy: Tensor, dpart: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        u, s, _, m, *_ = saved
        du, ds = torch.empty_like(u), None if s is None else torch.empty_like(s)
        layers, inputs, _, rank = u.shape
        _, blocks = grid = self._grid(u)
        shared = m.new_empty(1 + self.gate, layers, inputs, blocks, rank)
        dweight = m.new_empty(layers, inputs * blocks, rank, rank) if self.gate else None
        dpart = None if dpart is None else dpart.contiguous()
        given = dy.contiguous(), dpart, *saved, du, ds, shared, dweight
        launch(_backward, grid, *given, **self._sizes(saved), PART=dpart is not None)
        of_all = (shared.sum(-2, keepdim=True) if blocks > 1 else shared).unbind()
        return du, ds, (None, None, *of_all, *(() if dweight is None else (dweight.sum(1),)))

    @property
    def _pools(self) -> bool:
        return self.gate and self.pool

    def _grid(self, u: Tensor) -> tuple[int, int]:
        """Inputs of all layers, and the blocks of each that programs take."""
        layers, inputs, positions, _ = u.shape
        return layers * inputs, 1 if self._pools else triton.cdiv(positions, _rows(u))

    def _sizes(self, saved: Saved) -> dict[str, Any]:
        """The other arguments, those in capitals a kernel is compiled for."""
        u, s, _, _, _, _, weights = saved
        _, inputs, positions, rank = u.shape
        rows = _rows(u)
        return {
            "inputs": inputs,
            "positions": positions,
            "span": positions if self._pools else rows,
            "R": rank,
            "W": _width(rank),
            "N": rows,
            "GATE": self.gate,
            "NOISE": s is not None,
            "POOL": self._pools,
            "WEIGHTED": weights is not None,
        }


def _width(rank: int) -> int:
    """r filled up, to what tensor cores take at least."""
    return max(16, triton.next_power_of_2(rank))


def _rows(u: Tensor) -> int:
    """Positions of a block."""
    *_, positions, rank = u.shape
    return min(BLOCK // _width(rank), max(16, triton.next_power_of_2(positions)))


def launch(kernel: Any, grid: tuple[int, int], *given: Any, **sizes: Any) -> None:
    """Starts a kernel where its tensors are; Triton's interpreter takes a CPU's too."""
    device = given[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*given, **sizes, num_stages=1)
