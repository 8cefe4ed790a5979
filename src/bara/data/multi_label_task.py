"""Multi-label classification of texts: any number of labels for each."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bara.data.text_task import (
    LABEL_COLUMNS,
    TEXT_COLUMNS,
    TEXT_PAIR_COLUMNS,
    TaskType,
    TextTask,
    find_column,
    label_name,
    listed,
)
from bara.errors import BaraError
from bara.schema import shown

if TYPE_CHECKING:
    from datasets import Dataset

SEPARATOR = ";"
"""Between the labels of a text in a cell, where a column has no lists."""


@dataclass(frozen=True)
class MultiLabelTask(TextTask):
    """What to learn from a table whose label column has lists of names, empty ones too.

    Attributes are those of `TextTask`; `label_names` are the labels by index.
    """

    label_column: str = "labels"
    task: TaskType = "multi-label"

    @classmethod
    def infer(  # type: ignore[override]  # the task is known
        cls,
        dataset: Dataset,
        *,
        text_column: str | None = None,
        text_pair_column: str | None = None,
        label_column: str | None = None,
        max_length: int = 128,
    ) -> MultiLabelTask:
        """Describe the training table: columns as of `TextTask.infer`, labels in sorted order, or
        in the order of a `ClassLabel` feature.

        Raises:
            BaraError: a column is not there, or has no labels to learn from.
        """
        if max_length < 1:
            raise BaraError(f"max_length must be at least 1, not {max_length}")
        columns = dataset.column_names
        text = find_column(columns, text_column, TEXT_COLUMNS, "text")
        label = find_column(columns, label_column, ("labels", *LABEL_COLUMNS), "label")
        pair = text_pair_column or next((c for c in TEXT_PAIR_COLUMNS if c in columns), None)
        if pair is not None:
            pair = find_column(columns, pair, (), "text-pair")
        names = class_names(dataset, label) or tuple(
            sorted({name for labels in label_lists(dataset, label) for name in labels})
        )
        if not names:
            raise BaraError(f"column {label!r} has no labels: there is nothing to learn")
        return cls(text, label, pair, "multi-label", names, max_length)

    def encode_labels(self, dataset: Dataset, *, first_row: int = 1) -> Any:
        """1 for each label that a text has and 0 for the others, as numbers with a point: it is by
        these that a model of transformers tells several labels from one class.

        Raises:
            BaraError: a list of labels is missing, or a label was not there in training.
        """
        index = {name: i for i, name in enumerate(self.label_names)}
        rows = []
        for number, labels in enumerate(label_lists(dataset, self.label_column, first_row)):
            refuse_unseen(labels, index, self.label_column, first_row + number)
            row = [0.0] * len(index)
            for name in labels:
                row[index[name]] = 1.0
            rows.append(row)
        return rows


def class_names(dataset: Dataset, column: str) -> tuple[str, ...]:
    """The names of a column of lists of a `ClassLabel`; empty if it has none."""
    feature: Any = getattr(dataset.features[column], "feature", None)
    return tuple(feature.names) if hasattr(feature, "int2str") else ()


def label_lists(dataset: Dataset, column: str, first_row: int = 1) -> list[list[str]]:
    """The names in each cell: of a list, or of a text with `;` between them.

    Raises:
        BaraError: the column is not there, or a cell is neither.
    """
    names = class_names(dataset, find_column(dataset.column_names, column))
    rows = []
    for number, cell in enumerate(dataset[column], start=first_row):
        if isinstance(cell, str):
            rows.append([part.strip() for part in cell.split(SEPARATOR) if part.strip()])
        elif isinstance(cell, list):
            rows.append([names[i] if names else _name(i, column, number) for i in cell])
        else:
            raise BaraError(
                f"column {column!r} has {shown(cell)} in row {number}; give a list of labels, or a "
                f"text with {SEPARATOR!r} between them"
            )
    return rows


def refuse_unseen(labels: Iterable[str], known: Collection[str], column: str, row: int) -> None:
    """Raises BaraError for a label that was not there in training."""
    unseen = sorted(set(labels) - set(known))
    if unseen:
        raise BaraError(
            f"column {column!r} has labels that were not in the training data: {listed(unseen)} "
            f"(first in row {row}); the model knows {listed(known)}"
        )


def _name(value: Any, column: str, row: int) -> str:
    if not isinstance(value, str | int | bool | float) or value == "":
        raise BaraError(f"column {column!r} has the label {shown(value)} in row {row}")
    return label_name(value)
