"""Turning what a user has (a data set, a loader, one batch) into batches a model can take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from bara.errors import BaraError

Item = TypeVar("Item")
Batch = dict[str, Any]
Collate = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

PADDING = {"labels": -100, "word_ids": -1}
"""What pads a column of sequences, where it is not 0; input_ids take the model's pad token."""
NO_INPUTS = ("labels", "start_positions", "end_positions", "word_ids", "place")
"""Columns that are for what follows the model: what is right, and what its outputs belong to."""
LABELS = ("label", "label_ids")
"""Other names of the labels, which the collators of `Trainer` know."""


def pad_rows(rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0) -> Batch:
    """Stacks rows to tensors, padding sequences on the right; what is no numbers is left out.

    Raises:
        BaraError: rows of unequal length without an attention mask, or a column that only some
            rows have a value in.
    """
    batch: Batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        empty = sum(value is None for value in values)
        if 0 < empty < len(values):
            raise BaraError(
                f"The column {name!r} is empty in some rows: fill these in or drop them."
            )
        if empty or not _has_numbers(first):
            continue
        tensors = [torch.as_tensor(value) for value in values]
        lengths = {len(tensor) for tensor in tensors if tensor.dim() > 0}
        if len(lengths) > 1:
            if name == "input_ids" and "attention_mask" not in rows[0]:
                raise BaraError(
                    "Texts of unequal length need an attention_mask column, or a collate_fn that "
                    "makes one (a trainer's data_collator)."
                )
            padding = pad_token_id if name == "input_ids" else PADDING.get(name, 0)
            batch[name] = nn.utils.rnn.pad_sequence(tensors, True, padding)
        else:
            batch[name] = torch.stack(tensors)
    return batch


def num_rows(batch: Mapping[str, Any]) -> int:
    """Number of inputs in a batch.

    Raises:
        BaraError: it is not a mapping with tensors.
    """
    tensors = batch.values() if isinstance(batch, Mapping) else ()
    for value in tensors:
        if isinstance(value, Tensor) and value.dim() > 0:
            if not len(value):
                raise BaraError("The batch is empty: it has no row.")
            return int(value.shape[0])
    raise BaraError(
        "A batch must be a mapping of names to tensors, such as a tokeniser gives with "
        f"return_tensors='pt'; got {type(batch).__name__}."
    )


def batches(
    data: Any,
    model: nn.Module,
    batch_size: int,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
    description: str = "predicting",
) -> Iterator[tuple[Batch, list[int]]]:
    """Batches of tensors with the numbers of their rows in the data.

    A data set is taken in order of length, so that little is padding. Long work shows a progress
    bar on a terminal's standard error.

    Args:
        data: a tokenised `datasets.Dataset` (or list of rows), a stream of rows (a
            `datasets.IterableDataset`, in its own order), a DataLoader, or one batch.
        model: gives the pad token.
        batch_size: rows per batch for a data set; loaders and batches are taken as they are.
        collate_fn: for a data set, instead of padding on the right.
        progress: show a bar; None decides by whether standard error is a terminal.

    Raises:
        BaraError: empty data, or data of a type that is none of the above.
    """
    if batch_size < 1:
        raise BaraError(f"batch_size must be at least 1, got {batch_size}.")
    bar = partial(progress_bar, description=description, progress=progress)
    pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    collate = collate_fn or partial(pad_rows, pad_token_id=pad)
    if isinstance(data, Mapping):
        yield _with_labels(data), list(range(num_rows(data)))
    elif isinstance(data, DataLoader):
        seen = 0
        try:
            total: int | None = len(data)
        except TypeError:  # an iterable data set
            total = None
        for batch in bar(data, total=total):
            rows = num_rows(batch)
            yield _with_labels(batch), list(range(seen, seen + rows))
            seen += rows
        if not seen:
            raise BaraError("The data loader gave no batch.")
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        if not len(data):
            raise BaraError("The data set is empty.")
        _require_numbers(data[0])
        order = _by_length(data, data[0])
        starts = range(0, len(order), batch_size)
        for start in bar(starts):
            index = order[start : start + batch_size]
            yield _with_labels(collate([data[i] for i in index])), index
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, Tensor)):
        seen = 0
        stream = iter(bar(data))
        while items := list(islice(stream, batch_size)):
            _require_numbers(items[0])
            yield _with_labels(collate(items)), list(range(seen, seen + len(items)))
            seen += len(items)
        if not seen:
            raise BaraError("The data set is empty.")
    else:
        raise BaraError(
            "data must be a tokenised datasets.Dataset or IterableDataset, a DataLoader or a batch "
            f"(a mapping of tensors), got {type(data).__name__}."
        )


def progress_bar(
    items: Iterable[Item],
    *,
    description: str,
    progress: bool | None,
    total: int | None = None,
) -> Iterable[Item]:
    """The items, with a bar on standard error.

    Args:
        items: what is worked through.
        description: the work, in a word.
        progress: show a bar; None decides by whether standard error is a terminal.
        total: the number of items, if they have no length.
    """
    hidden = None if progress is None else not progress
    bar: Iterable[Item] = tqdm(items, description, total, leave=False, disable=hidden)
    return bar


def _require_numbers(row: Any) -> None:
    """Raises BaraError for a row that no model can take."""
    if not isinstance(row, Mapping) or not any(_is_numeric(value) for value in row.values()):
        raise BaraError(
            "The data set's rows hold nothing a model can take: tokenise it first "
            "(dataset.map(lambda row: tokenizer(row['text'], truncation=True)))."
        )


def _with_labels(batch: Mapping[str, Any]) -> Batch:
    """The batch, with its labels under the name that models take."""
    named = dict(batch)
    for name in LABELS:
        if "labels" not in named and isinstance(named.get(name), Tensor):
            named["labels"] = named.pop(name)
    return named


def _is_numeric(value: Any) -> bool:
    return isinstance(value, (int, float, list, tuple, Tensor)) or hasattr(value, "__array__")


def _has_numbers(value: Any) -> bool:
    """Whether a tensor can hold it: no text, date or mapping, nor a list of them."""
    if isinstance(value, (list, tuple)):
        return not value or _has_numbers(value[0])
    return _is_numeric(value)


def _by_length(data: Any, first: Mapping[str, Any]) -> list[int]:
    if "input_ids" not in first:
        return list(range(len(data)))
    lengths = (
        [len(ids) for ids in data["input_ids"]]
        if "input_ids" in (getattr(data, "column_names", None) or ())
        else [len(data[i]["input_ids"]) for i in range(len(data))]
    )
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def to_device(batch: Mapping[str, Any], device: torch.device) -> Batch:
    """The batch with its tensors on the device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
