"""Questions whose answers are spans of a context, cut into windows that a model can take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bara.errors import BaraError
from bara.schema import shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True)
class Passage:
    """One question's context, and what is known of its answers.

    Attributes:
        context: the text.
        offsets: first character and end of each of the context's T tokens.
        answers: first and last token of each reference, the same span once; empty for a question
            without an answer; None if nothing is known.
        texts: the references' texts.
    """

    context: str
    offsets: tuple[Span, ...]
    answers: tuple[Span, ...] | None = None
    texts: tuple[str, ...] = ()

    def text(self, span: Span) -> str:
        """The characters from the first to the last token of a span."""
        return self.context[self.offsets[span[0]][0] : self.offsets[span[1]][1]]


class QuestionWindows(Sequence[dict[str, Any]]):
    """Windows of questions' contexts: a data set for `bara.predict`, `bara.evaluate`, `Trainer`.

    A row has `input_ids`, `attention_mask` and so on; `place`: the number of the question, where
    the window's context begins in the row and in the context, how many tokens it has, and where
    the token stands that means "no answer"; with references also `start_positions` and
    `end_positions`, the first and the last token of the answer in the row, or that token if the
    answer is not in the window.

    Attributes:
        rows: the windows, question by question.
        passages: what the windows are of.
        unanswerable: whether a question may have no answer.
        max_answer_length: most tokens of a predicted answer.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        passages: Sequence[Passage],
        *,
        unanswerable: bool = False,
        max_answer_length: int = 30,
    ) -> None:
        self.rows = list(rows)
        self.passages = list(passages)
        self.unanswerable = unanswerable
        self.max_answer_length = max_answer_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def dataset(self) -> Dataset:
        """The rows as a data set, for `Trainer`."""
        from datasets import Dataset

        return Dataset.from_list(self.rows)


def question_windows(
    table: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 384,
    stride: int = 128,
    max_answer_length: int = 30,
    unanswerable: bool | None = None,
    labels: bool = True,
    columns: tuple[str, str, str] = ("question", "context", "answers"),
    first_row: int = 1,
) -> QuestionWindows:
    """Model inputs for questions in the form of SQuAD; a long context becomes several windows.

    Args:
        table: rows with `question`, `context` and `answers`: {"text": [...], "answer_start":
            [...]}, which are empty where the context has no answer.
        tokenizer: the model's, a fast one.
        max_length: most tokens of a window, with the question.
        stride: tokens that a window shares with the next.
        max_answer_length: most tokens of a predicted answer.
        unanswerable: whether a question may have no answer; None for whether one in the table has
            none.
        labels: whether the answers are known and are kept.
        columns: names of the three columns.
        first_row: the number that messages give to the first row.

    Raises:
        BaraError: a row is not of this form, an answer is not where it is said to be or fits into
            no window, or a question leaves no room for the context.
    """
    rows = list(table)
    if not rows:
        raise BaraError("the data has no rows; give at least one")
    limit = min(max_length, tokenizer.model_max_length)
    questions, contexts = (
        [_text(row, name, first_row + i) for i, row in enumerate(rows)] for name in columns[:2]
    )
    answers = [
        _answers(row, columns, first_row + i) if labels else None for i, row in enumerate(rows)
    ]
    if unanswerable is None:
        unanswerable = any(found == [] for found in answers)
    _require_room(questions, tokenizer, limit, stride, first_row)
    encoded = _encode(questions, contexts, tokenizer, limit, stride)
    offsets: list[list[Span]] = [[] for _ in rows]
    windows: list[list[dict[str, Any]]] = [[] for _ in rows]
    for number, question in enumerate(encoded.pop("overflow_to_sample_mapping")):
        inside = [i for i, part in enumerate(encoded.sequence_ids(number)) if part == 1]
        if not inside:
            raise BaraError(f"row {first_row + question}: the context is nothing to the tokeniser")
        found = [tuple(encoded["offset_mapping"][number][i]) for i in inside]
        known = offsets[question]
        # a window goes on where the last one ended, less the stride
        start = max(0, len(known) - stride) if known else 0
        if known[start:] != found[: len(known) - start]:
            raise BaraError(
                "the tokeniser's windows do not overlap by the stride: another tokeniser"
            )
        known += found[len(known) - start :]
        row = {name: column[number] for name, column in encoded.items()}
        del row["offset_mapping"]
        no_answer = _no_answer(row["input_ids"], tokenizer)
        row["place"] = [question, inside[0], start, len(inside), no_answer]
        windows[question].append(row)
    passages = []
    for i, given in enumerate(answers):
        where = f"row {first_row + i}"
        passage = Passage(contexts[i], tuple(offsets[i]))
        if given is not None:
            passage = _with_answers(passage, given, where, unanswerable)
            _label(windows[i], passage, where)
        passages.append(passage)
    return QuestionWindows(
        [row for part in windows for row in part],
        passages,
        unanswerable=unanswerable,
        max_answer_length=max_answer_length,
    )


def _encode(
    questions: list[str], contexts: list[str], tokenizer: Any, limit: int, stride: int
) -> Any:
    if not tokenizer.is_fast:
        raise BaraError("question answering needs a fast tokeniser, which knows where tokens stand")
    return tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=limit,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def _require_room(
    questions: list[str], tokenizer: Any, limit: int, stride: int, first_row: int
) -> None:
    """Refuses questions after which a window has too few tokens left to go on by some."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for row, ids in enumerate(tokenizer(questions, add_special_tokens=False)["input_ids"]):
        room = limit - special - len(ids)
        if room <= stride:
            raise BaraError(
                f"row {first_row + row}: the question leaves {max(room, 0)} of {limit} tokens for "
                f"the context, which must be more than the stride, {stride}: raise --max-length of "
                "`bara train`, or lower its stride (--set stride)"
            )


def _no_answer(ids: list[int], tokenizer: Any) -> int:
    """The position that stands for "no answer": that of [CLS] or its like, else the first."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def _text(row: Mapping[str, Any], column: str, number: int) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise BaraError(f"row {number} needs a text in the column {column!r}, not {shown(text)}")
    return text


def _answers(
    row: Mapping[str, Any], columns: tuple[str, str, str], number: int
) -> list[tuple[str, int]]:
    """Text and first character of each reference."""
    given, context = row.get(columns[2]), row[columns[1]]
    where = f"row {number}, column {columns[2]!r}"
    if not isinstance(given, Mapping):
        raise BaraError(
            f"{where} must be of the form {{'text': [...], 'answer_start': [...]}}, not "
            f"{shown(given)}"
        )
    texts, starts = given.get("text"), given.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise BaraError(f"{where} needs lists of one length under 'text' and 'answer_start'")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text or type(start) is not int:
            raise BaraError(f"{where}: an answer is a text and a whole number, where it starts")
        if start < 0 or context[start : start + len(text)] != text:
            raise BaraError(f"{where}: the context does not say {shown(text)} at {start}")
    return list(zip(texts, starts, strict=True))


def _with_answers(
    passage: Passage, given: list[tuple[str, int]], where: str, unanswerable: bool
) -> Passage:
    """The passage with its references as spans of tokens: those that the characters touch."""
    if not given and not unanswerable:
        raise BaraError(
            f"{where} has no answer, and the questions of the training data all had one"
        )
    spans = []
    for text, start in given:
        end = start + len(text)
        touched = [i for i, (a, b) in enumerate(passage.offsets) if a < end and b > start]
        if not touched:
            raise BaraError(f"{where}: the answer {shown(text)} is nothing to the tokeniser")
        spans.append((touched[0], touched[-1]))
    texts = tuple(text for text, _ in given)
    return Passage(passage.context, passage.offsets, tuple(dict.fromkeys(spans)), texts)


def _label(windows: list[dict[str, Any]], passage: Passage, where: str) -> None:
    """Gives every window the place of the first reference in it, as SQuAD's training does."""
    held = False
    for row in windows:
        _, begins, start, length, no_answer = row["place"]
        row["start_positions"] = row["end_positions"] = no_answer
        if passage.answers:
            first, last = (token - start for token in passage.answers[0])
            if first >= 0 and last < length:
                row["start_positions"], row["end_positions"] = begins + first, begins + last
                held = True
    if passage.answers and not held:
        raise BaraError(
            f"{where}: no window holds the whole answer: raise stride to its length in tokens"
        )
