"""A model's outputs under every draw, batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bara.draws.blocks import Blocks
from bara.draws.portions import Portions
from bara.errors import BaraError
from bara.prediction.batches import NO_INPUTS, Batch, Collate, batches, num_rows, to_device
from bara.prediction.likelihood import require_finite


def outputs_of_draws(
    model: nn.Module,
    draws: Portions,
    data: Any,
    read: Callable[[Any], Tensor],
    *,
    batch_size: int,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
) -> Iterator[tuple[Tensor, Batch, list[int]]]:
    """For each batch what is read from the model's outputs, the batch, and its rows' numbers.

    Args:
        model: in evaluation mode.
        draws: of it.
        data, collate_fn, progress: see `bara.predict`.
        read: takes the logits (rows, ...) from the model's outputs; an input has a row per draw.
        batch_size: most rows in one forward pass.

    Yields:
        Logits (S, n, ...), float32 on the CPU; the batch with all its columns, which the model is
        given those of that it takes, but for the labels; and the numbers of its n rows.

    Raises:
        BaraError: logits that are not finite, or not one row for each input and draw, or a batch
            with a name of an adapter for each row.
    """
    device = next(model.parameters()).device
    takes = accepted(model)
    inputs = draws.inputs(batch_size)
    for batch, index in batches(data, model, inputs, collate_fn, progress):
        if "adapter_names" in batch:
            raise BaraError(
                "a batch names an adapter for each row (adapter_names), and all rows are predicted "
                "by the active one: predict each adapter's rows after model.set_adapter(name)"
            )
        known = {k: v for k, v in batch.items() if k not in NO_INPUTS}
        known = {k: v for k, v in known.items() if takes is None or k in takes}
        run = partial(_outputs, model, to_device(known, device), num_rows(known), read)
        yield torch.cat(draws.map(run, num_rows(known), batch_size)), batch, index


def _outputs(
    model: nn.Module, batch: Batch, rows: int, read: Callable[[Any], Tensor], blocks: Blocks
) -> Tensor:
    """What is read from the outputs of a batch of n rows, (S, n, ...)."""
    logits = read(model(**blocks.repeat(batch)))
    if logits.shape[0] != rows * blocks.num_draws:
        raise BaraError(
            f"the model's logits {tuple(logits.shape)} are not one for each of the {rows} "
            "inputs of a batch"
        )
    return blocks.split(require_finite(logits).float().cpu())


def base_of(model: nn.Module) -> Any:
    """The model that an adapter was put on; the model itself without one."""
    wrapped: Any = model
    return wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped


def accepted(model: nn.Module) -> set[str] | None:
    """The forward arguments the base model names, None if there is no telling."""
    parameters = inspect.signature(base_of(model).forward).parameters
    return set(parameters) if "input_ids" in parameters or "pixel_values" in parameters else None
