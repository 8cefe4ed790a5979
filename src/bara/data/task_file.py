"""What a task is, kept as JSON in the adapter's folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from bara.errors import BaraError
from bara.schema import read_json

if TYPE_CHECKING:
    from datasets import Dataset

MEND = "it does not describe a task as `bara train` writes it; restore the file"


class Names(NamedTuple):
    """What others call a task.

    Attributes:
        auto_class: of transformers; its `from_pretrained` makes a model for the task.
        peft: `task_type` of PEFT; None where it has none.
        problem: `problem_type` of transformers, which decides a model's own loss; None where that
            is one in any case.
    """

    auto_class: str
    peft: str | None
    problem: str | None = None


class TaskFile:
    """A task, which is a dataclass: its file, its inputs, and what others call it."""

    @property
    def names(self) -> Names:
        """What others call it."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Write the description as JSON."""
        described: Any = self
        text = json.dumps(asdict(described), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            BaraError: the file is missing or does not describe a task; the message names the field.
        """
        task: Self = read_json(path, cls, MEND)
        if (wrong := task.wrong()) is not None:
            raise BaraError(f"{path}: {wrong}; {MEND}")
        return task

    def inputs(
        self, dataset: Dataset, tokenizer: Any, *, labels: bool = True, first_row: int = 1
    ) -> Any:
        """A table as the model of the task reads it: a data set, or for questions their windows.

        Args:
            dataset: its rows.
            tokenizer: the model's tokeniser, or its image processor.
            labels: whether the rows have labels to encode.
            first_row: number of the first row, for messages.

        Raises:
            BaraError: the table does not fit the task; the message says where.
        """
        raise NotImplementedError

    def wrong(self) -> str | None:
        """What the types of the fields do not say is wrong with them."""
        return None
