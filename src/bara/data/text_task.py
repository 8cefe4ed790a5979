"""What is learned from a table of texts: its columns, its labels, and the model's inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import ConfigDict, Field

from bara.data.task_file import Names, TaskFile
from bara.errors import BaraError
from bara.schema import STRICT, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TaskType = Literal["classification", "regression", "multi-label"]
TEXT_COLUMNS = ("text", "sentence", "sentence1")
TEXT_PAIR_COLUMNS = ("text_pair", "sentence2")
LABEL_COLUMNS = ("label", "labels", "target")
LARGEST_TARGET = 1e15
"""Variances are squares of the targets' unit, and have to fit 32-bit numbers."""
SMALLEST_STD = 1e-15

PROBLEMS: dict[TaskType, str] = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
}
Column = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class TextTask(TaskFile):
    """What to learn from a table: its columns, and how its labels are encoded.

    Attributes:
        text_column: the column with the texts.
        label_column: the column with the classes or the targets.
        text_pair_column: the column with the second text of each pair, if there is one.
        task: `classification` or `regression`.
        label_names: the classes by index; empty for regression.
        max_length: longer inputs are cut to this many tokens.
        target_mean, target_std: mean and standard deviation of the training targets. Regression
            models see targets in units of these; 0 and 1 for classification.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    text_column: Column = "text"
    label_column: Column = "label"
    text_pair_column: Column | None = None
    task: TaskType = "classification"
    label_names: tuple[str, ...] = ()
    max_length: Annotated[int, Field(ge=1)] = 128
    target_mean: Annotated[float, Field(ge=-LARGEST_TARGET, le=LARGEST_TARGET)] = 0.0
    target_std: Annotated[float, Field(ge=SMALLEST_STD, le=LARGEST_TARGET)] = 1.0

    @classmethod
    def infer(
        cls,
        dataset: Dataset,
        *,
        text_column: str | None = None,
        text_pair_column: str | None = None,
        label_column: str | None = None,
        task: TaskType | None = None,
        max_length: int = 128,
    ) -> TextTask:
        """Describe the training table, finding out what is not given.

        Columns are looked for under their usual names (`text`, `sentence`, `sentence1`;
        `text_pair`, `sentence2`; `label`, `labels`, `target`). A label column of fractional
        numbers means regression. Classes are sorted, numbers by value, so that their order does
        not depend on the order of the rows; a `ClassLabel` feature keeps its own order.

        Raises:
            BaraError: a column is not there, or its labels cannot be learnt from.
        """
        if max_length < 1:
            raise BaraError(f"max_length must be at least 1, not {max_length}")
        if len(dataset) == 0:
            raise BaraError("the training data has no rows; give at least one")
        columns = dataset.column_names
        text = find_column(columns, text_column, TEXT_COLUMNS, "text")
        label = find_column(columns, label_column, LABEL_COLUMNS, "label")
        pair = text_pair_column or next((c for c in TEXT_PAIR_COLUMNS if c in columns), None)
        if pair is not None:
            pair = find_column(columns, pair, (), "text-pair")
        values = list(dataset[label])
        refuse_missing(values, label)
        if task is None:
            task = (
                "regression" if any(_is_fraction(value) for value in values) else "classification"
            )
        described = cls(text, label, pair, task, max_length=max_length)
        if task == "classification":
            names = _class_names(dataset, label)
            return replace(described, label_names=names)
        if task == "regression":
            targets = _targets(values, label, first_row=1)
            largest = max(targets, key=abs)
            if abs(largest) > LARGEST_TARGET:
                raise BaraError(
                    f"column {label!r} has targets up to {largest:g}, too large for 32-bit "
                    "predictions; give them in a larger unit"
                )
            mean = math.fsum(targets) / len(targets)
            std = math.sqrt(math.fsum((t - mean) ** 2 for t in targets) / len(targets))
            if std == 0:
                raise BaraError(
                    f"every target in column {label!r} is {targets[0]:g}; there is nothing to learn"
                )
            if std < SMALLEST_STD:
                raise BaraError(
                    f"the targets in column {label!r} have a standard deviation of {std:g}, too "
                    "small for 32-bit predictions; give them in a smaller unit"
                )
            return replace(described, target_mean=mean, target_std=std)
        raise BaraError(f"task must be 'classification' or 'regression', not {task!r}")

    @property
    def names(self) -> Names:
        return Names("AutoModelForSequenceClassification", "SEQ_CLS", PROBLEMS[self.task])

    @property
    def num_labels(self) -> int:
        """Outputs of the model: one a class; for regression mean and log-variance."""
        return 2 if self.task == "regression" else len(self.label_names)

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns with the texts: one, or two for pairs."""
        pair = self.text_pair_column
        return (self.text_column,) if pair is None else (self.text_column, pair)

    def encode_labels(self, dataset: Dataset, *, first_row: int = 1) -> list[int] | list[float]:
        """Class indices, or standardised targets, one per row.

        Raises:
            BaraError: a label is missing, not a number, not finite, or unseen in training.
        """
        values = list(dataset[find_column(dataset.column_names, self.label_column)])
        refuse_missing(values, self.label_column, first_row)
        if self.task == "regression":
            targets = _targets(values, self.label_column, first_row)
            return [(target - self.target_mean) / self.target_std for target in targets]
        index = {name: i for i, name in enumerate(self.label_names)}
        names = _as_known(_label_names(dataset, self.label_column), self.label_names)
        unseen = sorted(set(names) - set(index))
        if unseen:
            row = first_row + next(i for i, name in enumerate(names) if name not in index)
            raise BaraError(
                f"column {self.label_column!r} has labels that were not in the training data: "
                f"{listed(unseen)} (first in row {row}); "
                f"the model knows {listed(self.label_names)}"
            )
        return [index[name] for name in names]

    def texts(self, dataset: Dataset, *, first_row: int = 1) -> list[list[str]]:
        """The texts, and the second texts if the task has pairs: one list of strings for each.

        Raises:
            BaraError: a column is not there, or a text is missing, empty or not a string.
        """
        return [_texts(dataset, column, first_row) for column in self.text_columns]

    def inputs(
        self,
        dataset: Dataset,
        tokenizer: Any,
        *,
        labels: bool = True,
        first_row: int = 1,
    ) -> Dataset:
        """Model inputs for a table: `input_ids`, `attention_mask`, ..., and `labels`.

        Nothing is padded: that is the collator's work, batch by batch. Regression labels are
        standardised; `bara.predict` returns them, and the predictions, in the units of the data.

        Args:
            dataset: the table.
            tokenizer: the model's tokeniser.
            labels: whether the table has labels to encode.
            first_row: the number that messages give to the first row.

        Raises:
            BaraError: the table does not fit the task; the message says which column and rows.
        """
        from datasets import Dataset

        if len(dataset) == 0:
            raise BaraError("the data has no rows; give at least one")
        columns = encode_texts(self.texts(dataset, first_row=first_row), tokenizer, self)
        if labels:
            columns["labels"] = self.encode_labels(dataset, first_row=first_row)
        return Dataset.from_dict(columns)

    def wrong(self) -> str | None:
        fewest = {"classification": 2, "multi-label": 1}.get(self.task, 0)
        if len(set(self.label_names)) < fewest:
            return f"label_names must be {fewest} classes or more"
        if len(set(self.label_names)) < len(self.label_names):
            return "label_names has a class twice"
        return None


def encode_texts(
    texts: Sequence[list[str]], tokenizer: PreTrainedTokenizerBase, task: TextTask
) -> dict[str, Any]:
    """Columns of model inputs, cut to the task's length, for texts or for pairs of them."""
    longest = min(task.max_length, tokenizer.model_max_length)
    return dict(tokenizer(*texts, truncation=True, max_length=longest))


def split_dataset(
    dataset: Dataset,
    test_size: float | int,
    *,
    seed: int = 0,
    label_column: str | None = None,
) -> tuple[Dataset, Dataset]:
    """Split the rows at random into (rest, test).

    Args:
        dataset: the table.
        test_size: a fraction of the rows, or a number of rows.
        seed: the same seed gives the same split.
        label_column: keep the proportions of these classes in both parts, where every class has
            at least two rows and both parts are large enough to hold every class.

    Raises:
        BaraError: one of the parts would be empty, or the column is not there.
    """
    from sklearn.model_selection import train_test_split

    total = len(dataset)
    count = round(test_size * total) if isinstance(test_size, float) else test_size
    if not 0 < count < total:
        raise BaraError(f"cannot take {test_size} of {total} rows: both parts must have some")
    classes = None
    if label_column is not None:
        names = _label_names(dataset, find_column(dataset.column_names, label_column))
        sizes = [names.count(name) for name in set(names)]
        if min(sizes) > 1 and len(sizes) <= min(count, total - count):
            classes = names
    rest, test = train_test_split(
        range(total), test_size=count, random_state=seed, stratify=classes
    )
    return dataset.select(sorted(rest)), dataset.select(sorted(test))


def find_column(
    columns: Sequence[str], given: str | None, usual: Sequence[str] = (), role: str = ""
) -> str:
    """The column of that name, or else the first usual one.

    Raises:
        BaraError: there is none; with a role the message names the option `--role-column`.
    """
    found = given or next((column for column in usual if column in columns), None)
    there = f"the columns are {listed(columns)}"
    if found is None:
        raise BaraError(f"which column has the {role}? Say so with --{role}-column; {there}")
    if found not in columns:
        option = f" (--{role}-column)" if role else ""
        raise BaraError(f"there is no column {found!r}{option}; {there}")
    return found


def listed(names: Iterable[str], at_most: int = 20) -> str:
    """Names for a message: quoted, and how many more there are."""
    quoted = [shown(name) for name in names]
    more = f" and {len(quoted) - at_most} more" if len(quoted) > at_most else ""
    return ", ".join(quoted[:at_most]) + more


def _rows(rows: Sequence[int], first_row: int) -> str:
    numbers = ", ".join(str(first_row + row) for row in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"row{'s' if len(rows) > 1 else ''} {numbers}{more}"


def refuse_missing(values: Sequence[Any], column: str, first_row: int = 1) -> None:
    """Refuses labels that are missing, or no labels at all: lists, objects, ..."""
    for row, value in enumerate(values):
        if isinstance(value, list | tuple | dict | bytes):
            raise BaraError(
                f"column {column!r} has {shown(value)} in row {first_row + row}; a label is a "
                "text, a number, true or false"
            )
    bad = [row for row, value in enumerate(values) if _is_missing(value)]
    if bad:
        raise BaraError(
            f"column {column!r} is empty, NaN or infinite in {_rows(bad, first_row)}; "
            "fill these in or drop them"
        )


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float) and not value.is_integer()


def _targets(values: Sequence[Any], column: str, first_row: int) -> list[float]:
    try:
        targets = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        bad = next(row for row, value in enumerate(values) if not _is_number(value))
        raise BaraError(
            f"column {column!r} has {shown(values[bad])} in row {first_row + bad}, not a number; "
            "regression needs numeric targets (or use --task classification)"
        ) from None
    refuse_missing(targets, column, first_row)
    return targets


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def label_name(value: Any) -> str:
    """The class that a value of a table stands for: 1.0 for "1", true for "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _label_names(dataset: Dataset, column: str) -> list[str]:
    values = list(dataset[column])
    feature = dataset.features[column]
    if hasattr(feature, "int2str"):
        return cast(list[str], feature.int2str(values))
    return [label_name(value) for value in values]


def _as_known(names: list[str], known: Sequence[str]) -> list[str]:
    """Labels by the spelling of the classes: 1 is the class 01, where there is no class 1."""
    if set(names) <= set(known):
        return names
    by_number: dict[float, list[str]] = {}
    for name in known:
        if _is_number(name):
            by_number.setdefault(float(name), []).append(name)
    found = {}
    for name in set(names) - set(known):
        same = by_number.get(float(name), []) if _is_number(name) else []
        found[name] = same[0] if len(same) == 1 else name
    return [found.get(name, name) for name in names]


def _class_names(dataset: Dataset, column: str) -> tuple[str, ...]:
    values = list(dataset[column])
    if any(_is_fraction(value) for value in values):
        raise BaraError(
            f"column {column!r} has fractional numbers, which are no classes; use --task regression"
        )
    feature = dataset.features[column]
    if hasattr(feature, "int2str"):
        names = tuple(feature.names)
    else:
        # A stable order: numbers by value, anything else as text.
        distinct = {label_name(value) for value in values}
        numeric = all(_is_number(name) for name in distinct)
        names = tuple(sorted(distinct, key=lambda n: (float(n) if numeric else 0.0, n)))
    if len(names) < 2:
        raise BaraError(
            f"column {column!r} has only the class {listed(names)}; "
            "classification needs two or more"
        )
    return names


def _texts(dataset: Dataset, column: str, first_row: int) -> list[str]:
    values = list(dataset[find_column(dataset.column_names, column)])
    bad = [row for row, v in enumerate(values) if not isinstance(v, str) or not v.strip()]
    if bad:
        found = values[bad[0]]
        kind = "empty" if found is None or isinstance(found, str) else f"not text ({shown(found)})"
        raise BaraError(
            f"column {column!r} is {kind} in {_rows(bad, first_row)}; fill these in or drop them"
        )
    return values
