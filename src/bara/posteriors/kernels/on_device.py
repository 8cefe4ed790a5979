"""BaRA's rank function by the kernels in `bara_kernel` where a GPU has them, else by PyTorch.

Triton builds a kernel on the machine that runs it, for its GPU and with its C compiler. So before a
kernel is used it is asked, once, whether it computes what PyTorch does there.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from bara.posteriors.bara_step import BaraStep

MOST_FACTORS = 64
"""r at most: a kernel keeps r x r weights, and their gradient, where there is little room."""
DEVICES = ("cuda",)
"""Types of devices that kernels are built for; Triton's interpreter, in the tests, takes a CPU."""
VARIABLE = "BARA_TRITON"
"""The environment variable that keeps PyTorch's operations where it is 0."""


def on_device(step: BaraStep, rank: int, dtype: torch.dtype, device: torch.device) -> BaraStep:
    """The same function, by kernels where they serve.

    Args:
        step: by PyTorch.
        rank: r.
        dtype: of the projections.
        device: theirs.
    """
    wanted = device.type in DEVICES and os.environ.get(VARIABLE) != "0"
    if not wanted or rank > MOST_FACTORS or dtype == torch.float64:
        return step
    return checked(step, rank, dtype, device)


@cache
def checked(step: BaraStep, rank: int, dtype: torch.dtype, device: torch.device) -> BaraStep:
    """The step by kernels if they agree with PyTorch's on random numbers, else itself, and a line.

    Warns:
        RuntimeWarning: the kernels do not run here, or not as they should.
    """
    if find_spec("triton") is None:  # PyTorch brings it along where it supports it
        return step
    try:
        from bara.posteriors.kernels.bara_kernel import BaraKernel

        kernel = BaraKernel(step.gate, step.noise, step.pool)
        difference = _difference(step, kernel, rank, dtype, device)
        reason = f"they differ from PyTorch's by {difference:.0e}"
        if difference < (1e-3 if dtype == torch.float32 else 3e-2):
            return kernel
    except Exception as error:  # of Triton, a C compiler, a driver
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    warnings.warn(
        f"BaRA's Triton kernels are not used on {device} ({reason}): steps are slower there, and "
        f"the same but for rounding. {VARIABLE}=0 in the environment does without this line.",
        RuntimeWarning,
        stacklevel=2,
    )
    return step


def _difference(
    step: BaraStep, kernel: BaraStep, rank: int, dtype: torch.dtype, device: torch.device
) -> float:
    """The largest difference of what both make of random numbers, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    layers, inputs, positions = 2, 2, 131  # blocks that are full, and one that is not
    u = normal(layers, inputs, positions, rank).to(dtype)
    s = normal(*u.shape).square().add(0.1).to(dtype) if step.noise else None
    e, m, offset = (normal(layers, inputs, 1, rank) for _ in range(3))
    gate = (offset, normal(layers, rank, rank)) if step.gate else ()
    weights = normal(inputs, positions).softmax(-1)
    dy, found = normal(*u.shape).to(dtype), []
    for function, wide in ((step, torch.float32), (kernel, dtype)):
        of_u, of_s = u.to(wide), None if s is None else s.to(wide)
        tensors = (m * 1.2, e, m, *gate)
        y, part, saved = function.forward(of_u, of_s, weights, tensors)
        du, ds, gradients = function.backward(saved, dy.to(wide), part)
        found.append([t.float() for t in (y, part, du, ds, *gradients) if t is not None])
    pairs = zip(*found, strict=True)
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)
