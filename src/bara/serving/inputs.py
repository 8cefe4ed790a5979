"""What requests for predictions and ranks give a model to read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bara.data.questions import QuestionWindows
from bara.data.text_task import TextTask, encode_texts
from bara.errors import BaraError
from bara.language.prompts import encode_prompt, require_room
from bara.language.tasks import LanguageTask
from bara.serving.limits import Limits
from bara.serving.problems import Problem
from bara.serving.schemas import READS, Asked, TextsRequest
from bara.serving.served import Served


def given(served: Served, request: TextsRequest, limits: Limits) -> list[list[str]]:
    """The inputs of a request, each a list: of one text or two, of words, of question and context.

    Raises:
        Problem: 400: they do not fit the task, are too many, or one is empty.
    """
    wanted = served.reads
    if wanted is None:
        message = f"{served.name} is a language model: use /v1/chat/completions or /v1/completions"
        raise Problem(400, message, param="model")
    for other in READS:
        if other != wanted and getattr(request, other) is not None:
            raise Problem(400, f"{served.name} reads {wanted}, not {other}", param=other)
    asked: Sequence[Any] | None = getattr(request, wanted)
    if asked is None:
        raise Problem(400, f"{wanted} is missing", param=wanted)
    limits.require(wanted, len(asked), limits.texts)
    inputs = [_parts(one) for one in asked]
    for number, parts in enumerate(inputs):
        if not all(part.strip() for part in parts):
            raise Problem(400, f"{wanted}.{number} is empty", param=wanted)
    return inputs


def _parts(one: str | list[str] | Asked) -> list[str]:
    if isinstance(one, Asked):
        return [one.question, one.context]
    return [one] if isinstance(one, str) else one


def encode(served: Served, inputs: Sequence[Any]) -> Any:
    """Inputs as the model reads them: rows, or for questions the windows of their contexts.

    Raises:
        Problem: 400: one is too long, or nothing to the tokeniser.
    """
    task = served.task
    if isinstance(task, TextTask):
        parts = [list(part) for part in zip(*inputs, strict=True)]
        columns = encode_texts(parts, served.tokenizer, task)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    try:
        if isinstance(task, LanguageTask):
            return [_prompt(served, text) for text in inputs]
        table = _table(task, inputs)
        return task.inputs(table, served.tokenizer, labels=False, first_row=0)
    except BaraError as error:
        kind = served.reads or "texts"
        message = re.sub(r"\brow (\d+)", rf"{kind}.\1", str(error))
        raise Problem(400, message, param=kind) from error


def owners(data: Any) -> list[int]:
    """For each row of what `encode` made the number of its input: a context may have several."""
    if isinstance(data, QuestionWindows):
        return [row["place"][0] for row in data]
    return list(range(len(data)))


def _table(task: Any, inputs: Sequence[list[str]]) -> Any:
    from datasets import Dataset

    columns = task.text_columns
    values = [list(inputs)] if len(columns) == 1 else zip(*inputs, strict=True)
    return Dataset.from_dict(dict(zip(columns, map(list, values), strict=True)))


def _prompt(served: Served, text: Any) -> dict[str, Any]:
    ids = encode_prompt(served.tokenizer, text)
    require_room(served.model, len(ids))
    return {"input_ids": ids, "attention_mask": [1] * len(ids)}
