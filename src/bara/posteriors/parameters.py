"""Parameters that get another value than the optimiser's, once it is there."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.state import is_initialized
from accelerate.utils import DistributedType
from torch import Tensor

COPY = "_hp_mapping"
"""Attribute of the parameters of which DeepSpeed's ZeRO-1 and 2 train copies in float32."""


def can_set(parameter: Tensor) -> bool:
    """Whether no optimiser has a copy of a parameter that is out of reach, as DeepSpeed has of
    those of 16 bits without ZeRO."""
    # asking for a state that is not there would start the processes' group
    deepspeed = is_initialized() and PartialState().distributed_type == DistributedType.DEEPSPEED
    return not deepspeed or parameter.dtype == torch.float32 or hasattr(parameter, COPY)


@torch.no_grad()
def set_parameter(parameter: Tensor, value: Tensor | float) -> None:
    """Gives a parameter a value, and the copy of it that DeepSpeed trains and would put back.

    Args:
        parameter: in training, or not.
        value: of its shape, or one number for all of it.
    """
    if isinstance(value, Tensor):
        parameter.copy_(value)
    else:
        parameter.fill_(value)
    if hasattr(parameter, COPY):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, parameter.float())
