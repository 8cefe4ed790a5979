"""A table as the model of a task reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bara.cards.adapter_files import TASK_FILE
from bara.data.images import IMAGE_TASK, ImageTask, image_table
from bara.data.multi_label_task import MultiLabelTask
from bara.data.tables import load_table
from bara.data.tag_task import TagTask
from bara.data.task_file import MEND
from bara.data.tasks import TABLE_TASKS
from bara.data.text_task import TextTask
from bara.errors import BaraError
from bara.language.multiple_choice import multiple_choice
from bara.language.tasks import (
    LANGUAGE_TASKS,
    LanguageTask,
    Task,
    is_multiple_choice,
    questions,
)
from bara.prediction.predict import predict
from bara.prediction.predictive import Predictive
from bara.prediction.words import TokenPredictive
from bara.schema import read_json, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_Named = dict[str, Any]
"""Any JSON object, before its `task` says of which kind it is."""


def load_task(folder: Path) -> Task:
    """What an adapter was trained for.

    Raises:
        BaraError: the file is missing or does not describe a task.
    """
    path = folder / TASK_FILE
    name = read_json(path, _Named, MEND).get("task")
    if name in LANGUAGE_TASKS:
        return LanguageTask.load(path)
    if name == IMAGE_TASK:
        return ImageTask.load(path)
    if not isinstance(name, str) or name not in TABLE_TASKS:
        known = ", ".join((*TABLE_TASKS, *LANGUAGE_TASKS, IMAGE_TASK))
        raise BaraError(f"{path}: task must be {known}, not {shown(name)}; {MEND}")
    return TABLE_TASKS[name].load(path)


def read_table(source: str, task: Task, *, split: str | None = None) -> Dataset:
    """A table for a task: its texts stay texts, even where all of them look like numbers.

    Raises:
        BaraError: see `bara.data.tables.load_table` and `bara.data.images.image_table`.
    """
    if isinstance(task, ImageTask):
        return image_table(source, split=split)
    texts = () if isinstance(task, LanguageTask) else task.text_columns
    if isinstance(task, MultiLabelTask):
        texts += (task.label_column,)
    return load_table(source, split=split, text_columns=texts)


def text_task(task: Task, command: str) -> TextTask:
    """The task, if it is one of `TextTask`'s.

    Raises:
        BaraError: the adapter is a language model's or reads images.
    """
    if isinstance(task, ImageTask):
        raise BaraError(f"`bara {command}` is for texts, and this adapter is for images")
    if isinstance(task, LanguageTask):
        raise BaraError(
            f"`bara {command}` needs labelled classes, and this adapter was trained for "
            f"{task.task}: use `bara generate`"
        )
    if not isinstance(task, TextTask):
        raise BaraError(f"`bara {command}` is not for adapters that were trained for {task.task}")
    return task


def predict_table(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    table: Dataset,
    *,
    labels: bool = True,
    first_row: int = 1,
    command: str = "predict",
    **options: Any,
) -> Predictive:
    """The predictive distribution of a table's texts, questions or images.

    Args:
        model, tokenizer, task: what `load_adapter` returns.
        table: its rows.
        labels: whether the rows have labels, which the predictive then keeps. Without, the answers
            of multiple choice are kept if all questions have one.
        first_row: number of the first row, for messages.
        command: what the user typed, for messages.
        **options: `num_draws`, `seed`, `deterministic`, `batch_size`, `progress` of `bara.predict`.

    Raises:
        BaraError: the task is causal-lm, a label is missing, or any error of `bara.predict` or
            `bara.multiple_choice`.
    """
    if is_multiple_choice(task):
        asked = questions(table, first_row=first_row)
        bare = [row for row, q in enumerate(asked, start=first_row) if q.answer is None]
        if labels and bare:
            raise BaraError(f"row {bare[0]} has no answer: fill in the column 'answer'")
        return multiple_choice(model, tokenizer, asked, scoring=task.scoring, **options)
    if isinstance(task, LanguageTask):
        text_task(task, command)  # says what it is for
    inputs = task.inputs(table, tokenizer, labels=labels, first_row=first_row)
    predictive = predict(model, inputs, **options)
    if isinstance(predictive, TokenPredictive) and isinstance(task, TagTask):
        words = task.words(table, first_row=first_row)
        return replace(predictive, texts=tuple(tuple(row) for row in words))
    return predictive


def records_of(predictive: Predictive, task: Task, table: Dataset) -> list[dict[str, Any]]:
    """What `bara predict` writes of a table's rows: the records of their predictions, those of
    images with the file's name, where it came from a file."""
    records = predictive.to_records()
    if not isinstance(task, ImageTask):
        return records
    return [
        {"image": image, **record} if isinstance(image, str) else record
        for image, record in zip(table["image"], records, strict=True)
    ]
