"""What a call of a model gives: its loss and its tensors, in any of the forms that models have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def with_loss(outputs: Any, elbo: Callable[[Tensor], Tensor], has_labels: bool) -> Any:
    """The outputs with their loss completed to the ELBO, if they have a loss."""
    if isinstance(outputs, tuple):
        first = outputs[0] if outputs else None
        if not (has_labels and isinstance(first, Tensor) and first.dim() == 0):
            return outputs
        completed = (elbo(first), *outputs[1:])
        return type(outputs)(*completed) if hasattr(outputs, "_fields") else completed
    if isinstance(outputs, Mapping):
        if isinstance(outputs.get("loss"), Tensor):
            outputs["loss"] = elbo(outputs["loss"])  # type: ignore[index]
    elif isinstance(getattr(outputs, "loss", None), Tensor):
        outputs.loss = elbo(outputs.loss)
    return outputs


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors among a model's outputs."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    elif not isinstance(outputs, (tuple, list)):
        outputs = vars(outputs).values() if hasattr(outputs, "__dict__") else ()
    return [value for value in outputs if isinstance(value, Tensor)]
