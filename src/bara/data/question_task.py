"""Extractive question answering: what a table of questions has, and how contexts are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from bara.data.questions import QuestionWindows, question_windows
from bara.data.task_file import Names, TaskFile
from bara.data.text_task import Column, find_column
from bara.errors import BaraError
from bara.schema import STRICT

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class QuestionTask(TaskFile):
    """What to learn from a table in the form of SQuAD.

    Attributes:
        text_column, context_column, label_column: the columns with the questions, their contexts
            and their answers, as of `question_windows`.
        task: `question-answering`.
        max_length: most tokens of a question with a window of its context.
        stride: tokens that a window shares with the next; None for a third of `max_length`.
        max_answer_length: most tokens of a predicted answer.
        unanswerable: whether a question may have no answer, as one of the training data has none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    text_column: Column = "question"
    context_column: Column = "context"
    label_column: Column = "answers"
    task: Literal["question-answering"] = "question-answering"
    max_length: Annotated[int, Field(ge=1)] = 384
    stride: Annotated[int, Field(ge=0)] | None = None
    max_answer_length: Annotated[int, Field(ge=1)] = 30
    unanswerable: bool = False

    @classmethod
    def infer(
        cls,
        dataset: Dataset,
        *,
        text_column: str | None = None,
        text_pair_column: str | None = None,
        label_column: str | None = None,
        max_length: int = 384,
        stride: int | None = None,
        max_answer_length: int = 30,
    ) -> QuestionTask:
        """Describe the training table: `question`, `context` (of `text_pair_column`), `answers`.

        Raises:
            BaraError: a column is not there, or a number is out of range.
        """
        least = {"max_length": (max_length, 1), "max_answer_length": (max_answer_length, 1)}
        least["stride"] = (0 if stride is None else stride, 0)
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise BaraError(f"{name} must be at least {lowest}, not {value}")
        columns = dataset.column_names
        question = find_column(columns, text_column, ("question",), "text")
        context = find_column(columns, text_pair_column, ("context",), "text-pair")
        label = find_column(columns, label_column, ("answers",), "label")
        described = cls(
            question,
            context,
            label,
            max_length=max_length,
            stride=stride,
            max_answer_length=max_answer_length,
        )
        given = [row for row in dataset[label] if isinstance(row, dict)]
        return replace(described, unanswerable=any(not row.get("text") for row in given))

    @property
    def names(self) -> Names:
        return Names("AutoModelForQuestionAnswering", "QUESTION_ANS")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns with the questions and the contexts."""
        return self.text_column, self.context_column

    def inputs(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: bool = True,
        first_row: int = 1,
    ) -> QuestionWindows:
        """The windows of a table's questions.

        Raises:
            BaraError: see `question_windows`.
        """
        columns = (self.text_column, self.context_column, self.label_column)
        for column in columns if labels else columns[:2]:
            find_column(dataset.column_names, column)
        limit = min(self.max_length, tokenizer.model_max_length)
        return question_windows(
            dataset,
            tokenizer,
            max_length=limit,
            stride=limit // 3 if self.stride is None else self.stride,
            max_answer_length=self.max_answer_length,
            unanswerable=self.unanswerable,
            labels=labels,
            columns=columns,
            first_row=first_row,
        )
