"""A linear layer whose parameter is its weight in other units, for the optimiser alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bara.posteriors.parameters import set_parameter


class ScaledLinear(nn.Linear):
    """y = W x + b with W = scale V: what an optimiser sees of a linear layer is V.

    Only the parameter is in other units: the state dict has W, and so has every file. `scale` is a
    power of two, so that nothing is rounded on the way.
    """

    scale: float

    def forward(self, x: Tensor) -> Tensor:
        # W, not scale x, which 16 bits might not hold
        return nn.functional.linear(x, self.weight * self.scale, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"] * self.scale

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        name = f"{prefix}weight"
        if name in state_dict:
            state_dict = {**state_dict, name: state_dict[name] / self.scale}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def can_scale(layer: nn.Module) -> bool:
    """Whether a layer is a plain linear one, whose `forward` nobody but accelerate has replaced."""
    own = vars(layer)
    return type(layer) is nn.Linear and ("forward" not in own or "_old_forward" in own)


@torch.no_grad()
def scale_layer(layer: nn.Linear, scale: float) -> bool:
    """Makes a linear layer a scaled one with the same outputs, in its place.

    Returns:
        Whether it did: not where the layer's dtype would round V.
    """
    weight = layer.weight.detach()
    if not torch.equal(weight / scale * scale, weight):
        return False
    set_parameter(layer.weight, weight / scale)
    _become(layer, ScaledLinear)
    layer.scale = scale  # type: ignore[assignment]  # it is one now
    return True


@torch.no_grad()
def restore_head(model: nn.Module) -> None:
    """Makes scaled layers plain linear ones again, with the same outputs."""
    reshard(model)
    for module in model.modules():
        if type(module) is ScaledLinear:
            set_parameter(module.weight, module.weight * module.scale)
            del module.scale
            _become(module, nn.Linear)


def reshard(model: nn.Module) -> None:
    """Has FSDP2 put back the parameters themselves, in place of the copies that a pass has left."""
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _become(layer: Any, kind: type[nn.Linear]) -> None:
    """Changes a layer's class in its place: its parameters stay those that an optimiser has."""
    layer.__class__ = kind
    if "_old_forward" in vars(layer):  # what accelerate's hooks (device_map) call
        layer._old_forward = kind.forward.__get__(layer)
