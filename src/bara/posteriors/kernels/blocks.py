"""What the kernels have in common: how they read and write blocks, and how they are launched.

A program takes the positions of one input in one layer: a block of them where each is looked at on
its own, all of them where they share what depends on the sequence. Nothing but what it is given is
kept for the way back: reading that again costs less than writing down what was made of it. What
programs add up (gradients of what positions share) each writes to a place of its own, so that the
order of the sums, and with it every bit, is the same each time.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bara.posteriors import rank_functions

LEAST = tl.constexpr(rank_functions.LEAST_ROOT_MEAN_SQUARE**2)
BLOCK = 1024
"""Elements of a block of positions, at most."""


@triton.jit
def read(tensor, first, positions, start, R: tl.constexpr, W: tl.constexpr, N: tl.constexpr):
    """N positions of one input from `start` on, (N, W), zeros outside of it."""
    row, column = start + tl.arange(0, N)[:, None], tl.arange(0, W)[None, :]
    inside = (row < positions) & (column < R)
    return tl.load(tensor + first + row * R + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def write(tensor, values, first, positions, start, R: tl.constexpr):
    """The other way."""
    N: tl.constexpr = values.shape[0]
    W: tl.constexpr = values.shape[1]
    row, column = start + tl.arange(0, N)[:, None], tl.arange(0, W)[None, :]
    inside = (row < positions) & (column < R)
    tl.store(tensor + first + row * R + column, values.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def counts(weights, first, positions, start, WEIGHTED: tl.constexpr, N: tl.constexpr):
    """What positions count in the mean of their input, (N, 1)."""
    row = start + tl.arange(0, N)[:, None]
    if WEIGHTED:
        found = tl.load(weights + first + row, mask=row < positions, other=0.0).to(tl.float32)
    else:
        found = tl.where(row < positions, 1.0 / positions, 0.0)
    return found


@triton.jit
def mean(
    u, weights, first, first_count, positions,
    R: tl.constexpr, W: tl.constexpr, N: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """That of an input's positions, (1, W)."""
    total = tl.zeros((1, W), tl.float32)
    for start in range(0, positions, N):
        read_counts = counts(weights, first_count, positions, start, WEIGHTED, N)
        total += tl.sum(read(u, first, positions, start, R, W, N) * read_counts, axis=0)[None, :]
    return total


@triton.jit
def direction(features, R: tl.constexpr):
    """features / |features|, and that norm."""
    norm = tl.sqrt(tl.sum(features * features, axis=1)[:, None] + LEAST * R)
    return features / norm, norm


@triton.jit
def times(left, right, POOL: tl.constexpr):
    """left @ right; a single row is less than what tensor cores take."""
    if POOL:
        out = tl.sum(tl.trans(left) * right, axis=0)[None, :]
    else:
        out = tl.dot(left, right, input_precision="ieee")
    return out


def width(size: int) -> int:
    """r filled up, to what tensor cores take at least."""
    return max(16, triton.next_power_of_2(size))


def grid_and_sizes(
    u: Tensor, weights: Tensor | None, pool: bool, widest: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Programs by inputs of all layers and blocks, and the arguments that say so.

    Args:
        u: (K, B, T, r).
        weights: what the positions count in their input's mean, if they do not count alike.
        pool: a program has all positions.
        widest: of the matrices that a position is multiplied by.
    """
    layers, inputs, positions, rank = u.shape
    rows = min(BLOCK // width(widest), max(16, triton.next_power_of_2(positions)))
    sizes = {
        "inputs": inputs,
        "positions": positions,
        "span": positions if pool else rows,
        "R": rank,
        "W": width(rank),
        "N": rows,
        "POOL": pool,
        "WEIGHTED": weights is not None,
    }
    return (layers * inputs, 1 if pool else triton.cdiv(positions, rows)), sizes


def launch(kernel: Any, grid: tuple[int, int], *given: Any, **sizes: Any) -> None:
    """Starts a kernel where its tensors are; Triton's interpreter takes a CPU's too."""
    device = given[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*given, **sizes, num_stages=1)
