"""A table as the model of a task reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bara.cards.adapter_files import TASK_FILE
from bara.data.text_task import TextTask, tokenise
from bara.errors import BaraError
from bara.language.multiple_choice import multiple_choice
from bara.language.tasks import (
    LANGUAGE_TASKS,
    LanguageTask,
    Task,
    is_multiple_choice,
    questions,
    tokenise_language,
)
from bara.prediction.predict import predict
from bara.prediction.predictive import Predictive

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_task(folder: Path) -> Task:
    """What an adapter was trained for.

    Raises:
        BaraError: the file is missing or does not describe a task.
    """
    path = folder / TASK_FILE
    try:
        fields = json.loads(path.read_text("utf-8"))
        if fields.get("task") in LANGUAGE_TASKS:
            return LanguageTask(**fields)
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # the next line says what is wrong
    return TextTask.load(path)


def text_task(task: Task, command: str) -> TextTask:
    """The task, if it is one of `TextTask`'s.

    Raises:
        BaraError: the adapter is a language model's.
    """
    if isinstance(task, LanguageTask):
        raise BaraError(
            f"`bara {command}` needs labelled classes, and this adapter was trained for "
            f"{task.task}: use `bara generate`"
        )
    return task


def model_inputs(
    table: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, *, labels: bool = True
) -> Dataset:
    """A table as the model of a task reads it.

    Args:
        table: its rows.
        tokenizer: the model's.
        task: what the model is for.
        labels: keep the labels; a language model's inputs always have theirs.

    Raises:
        BaraError: see `bara.data.text_task.tokenise` and `bara.language.tasks.tokenise_language`.
    """
    if isinstance(task, LanguageTask):
        return tokenise_language(table, tokenizer, task)
    return tokenise(table, tokenizer, task, labels=labels)


def predict_table(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    table: Dataset,
    *,
    labels: bool = True,
    first_row: int = 1,
    **options: Any,
) -> Predictive:
    """The predictive distribution of a table's texts or questions.

    Args:
        model, tokenizer, task: what `load_adapter` returns.
        table: its rows.
        labels: whether the rows have labels, which the predictive then keeps; the answers of
            multiple choice are kept where there are any.
        first_row: number of the first row, for messages.
        **options: `num_draws`, `seed`, `deterministic`, `batch_size`, `progress` of `bara.predict`.

    Raises:
        BaraError: the task is causal-lm, or any error of `bara.predict` or `bara.multiple_choice`.
    """
    if is_multiple_choice(task):
        asked = questions(table, first_row=first_row)
        return multiple_choice(model, tokenizer, asked, scoring=task.scoring, **options)
    task = text_task(task, "predict")
    return predict(
        model, tokenise(table, tokenizer, task, labels=labels, first_row=first_row), **options
    )
