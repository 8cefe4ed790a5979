"""Rank functions by the kernels of this package where a GPU has them, else by PyTorch.

Triton builds a kernel on the machine that runs it, for its GPU and with its C compiler. So before a
kernel is used it is asked, once, whether it computes what PyTorch does there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from bara.posteriors.rank_functions import RankFunction

F = TypeVar("F", bound=RankFunction)
WIDEST = 64
"""r at most: a kernel keeps a matrix of r x r, and its gradient, where there is little room."""
DEVICES = ("cuda",)
"""Types of devices that kernels are built for; Triton's interpreter, in the tests, takes a CPU."""
VARIABLE = "BARA_TRITON"
"""The environment variable that keeps PyTorch's operations where it is 0."""


def on_device(step: F, name: str, tensors: Sequence[Tensor], dtype: torch.dtype) -> F:
    """The same function, by kernels where they serve.

    Args:
        step: by PyTorch.
        name: of the file beside this one that has the kernels.
        tensors: the step's.
        dtype: of the projections.
    """
    device, widths = tensors[0].device, tuple(tensor.shape[-1] for tensor in tensors)
    wanted = device.type in DEVICES and os.environ.get(VARIABLE) != "0"
    if not wanted or max(widths) > WIDEST or dtype == torch.float64:
        return step
    return checked(step, name, widths, dtype, device)  # type: ignore[arg-type]


@cache
def checked(
    step: Any, name: str, widths: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Any:
    """The step by kernels if they agree with PyTorch's on random numbers, else itself, and a line.

    Warns:
        RuntimeWarning: the kernels do not run here, or not as they should.
    """
    if find_spec("triton") is None:  # PyTorch brings it along where it supports it
        return step
    try:
        kernels = import_module(f"bara.posteriors.kernels.{name}")
        kernel = kernels.kernel(step)
        difference = _difference(step, kernel, kernels.example, widths, dtype, device)
        reason = f"they differ from PyTorch's by {difference:.0e}"
        if difference < (1e-3 if dtype == torch.float32 else 3e-2):
            return kernel
    except Exception as error:  # of Triton, a C compiler, a driver
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    warnings.warn(
        f"The Triton kernels of {name} are not used on {device} ({reason}): steps are slower "
        f"there, and the same but for rounding. {VARIABLE}=0 in the environment does without "
        "this line.",
        RuntimeWarning,
        stacklevel=2,
    )
    return step


def _difference(
    step: RankFunction,
    kernel: RankFunction,
    example: Any,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """The largest difference of what both make of random numbers, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    layers, inputs, positions = 2, 2, 131  # blocks that are full, and one that is not
    u = normal(layers, inputs, positions, widths[0]).to(dtype)
    s = normal(*u.shape).square().add(0.1).to(dtype)
    tensors = example(step, normal, layers, inputs, widths)
    weights = normal(inputs, positions).softmax(-1)
    dy, found = normal(*u.shape).to(dtype), []
    for function, wide in ((step, torch.float32), (kernel, dtype)):
        of_s = s.to(wide) if getattr(function, "noise", True) else None
        y, part, saved = function.forward(u.to(wide), of_s, weights, tensors)
        du, ds, gradients = function.backward(saved, dy.to(wide), part)
        found.append([t.float() for t in (y, part, du, ds, *gradients) if t is not None])
    pairs = zip(*found, strict=True)
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)
