"""What PEFT 0.20, which Axolotl pins, needs besides; it goes when the floor is 0.21.

PEFT 0.21 asks a method's model (`BayesianLoraModel`) what to save and under which names. 0.20 saves
the methods of an enumeration, by what their names begin with, and takes an adapter's name off the
last part of a tensor's name only. With 0.21 nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from peft import PeftType
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

from bara.errors import BaraError

ASKS_THE_MODEL = hasattr(LoraModel, "_remap_adapter_state_dict_for_load")
"""Whether this is PEFT 0.21 or later."""


def enter_into_enumeration(name: str) -> None:
    """Makes a method's name one of `list(PeftType)`, where PEFT looks it up before it saves."""
    if ASKS_THE_MODEL or name in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)


def refuse_what_is_not_saved(config: Any) -> None:
    """Refuses trained biases of the base model, which would be left out of the file."""
    if not ASKS_THE_MODEL and config.bias != "none":
        raise BaraError(
            f"{type(config).__name__}: bias={config.bias!r} needs peft 0.21 or later, earlier ones "
            "do not save such biases. Install it, or leave bias at 'none'."
        )


def refuse_conversion(layer: nn.Module) -> None:
    """Has `peft.convert_to_lora` refuse the layer: it would read A and B without the posterior."""
    if not ASKS_THE_MODEL:
        layer.supports_lora_conversion = _no  # type: ignore[assignment]


def _no(adapter_name: str = "default") -> bool:
    return False


def read_saved_names(posteriors: nn.ModuleDict, renamed: Callable[[str], str] = str) -> None:
    """Has posteriors load tensors that were saved with their adapter's name, or under older names.

    Args:
        posteriors: by the names of their adapters.
        renamed: a saved tensor's name today.
    """
    if not ASKS_THE_MODEL:
        posteriors.register_load_state_dict_pre_hook(partial(_rename, renamed))


def _rename(
    renamed: Callable[[str], str],
    posteriors: nn.ModuleDict,
    tensors: dict[str, Tensor],
    prefix: str,
    *_: object,
) -> None:
    for adapter, posterior in posteriors.items():
        own, start = posterior.state_dict().keys(), f"{prefix}{adapter}."
        for key in [key for key in tensors if key.startswith(start)]:
            name = renamed(prefix + key.removeprefix(start)).removeprefix(prefix)
            if name not in own:
                name = name.partition(".")[2]
            if name in own:
                tensors[start + name] = tensors.pop(key)
