"""Multiple-choice questions."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from bara.errors import BaraError

Scoring = Literal["text", "letter"]
LETTERS = string.ascii_uppercase


class Question(NamedTuple):
    """A question with its choices.

    Attributes:
        question: the text.
        choices: two or more texts.
        answer: index of the right choice, or None.
        verbatim: whether the text is the whole prompt, word for word.
    """

    question: str
    choices: tuple[str, ...]
    answer: int | None = None
    verbatim: bool = False

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str = "A question") -> Question:
        """Reads `question`, or a whole `prompt` in its place, `choices` and, if it is there,
        `answer`: an index, a letter or a choice's text.

        Raises:
            BaraError: one of them is missing or makes no sense; `where` begins the message.
        """
        prompt, answer = record.get("prompt"), record.get("answer")
        question = record.get("question") if prompt is None else prompt
        choices: Any = record.get("choices")
        if not isinstance(question, str) or not question.strip():
            raise BaraError(f"{where} needs a text under 'question', or under 'prompt'.")
        texts = isinstance(choices, Sequence) and not isinstance(choices, str)
        if not texts or not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise BaraError(f"{where} needs a list of texts under 'choices'.")
        if not 2 <= len(choices) <= len(LETTERS):
            raise BaraError(f"{where} needs 2 to {len(LETTERS)} choices.")
        if answer is not None:
            index = _answer_index(answer, list(choices))
            if index is None:
                raise BaraError(
                    f"{where} has the answer {answer!r}, which is no index from 0 to "
                    f"{len(choices) - 1}, letter or text of one of its {len(choices)} choices."
                )
            answer = index
        verbatim = prompt is not None
        text = question if verbatim else question.strip()
        return cls(text, tuple(choice.strip() for choice in choices), answer, verbatim)

    def prompt(self, scoring: Scoring) -> str:
        """What the model reads before a choice; with letters, the choices are part of it."""
        if self.verbatim:
            return self.question
        if scoring == "text":
            return f"Question: {self.question}\nAnswer:"
        listed = "".join(f"\n{LETTERS[i]}. {choice}" for i, choice in enumerate(self.choices))
        return f"Question: {self.question}{listed}\nAnswer:"

    def completions(self, scoring: Scoring) -> list[str]:
        """What the model may say, one for each choice."""
        if scoring == "text":
            return [f" {choice}" for choice in self.choices]
        return [f" {LETTERS[i]}" for i in range(len(self.choices))]


def _answer_index(answer: Any, choices: list[str]) -> int | None:
    if isinstance(answer, str):
        if answer in choices:  # data sets have a few questions with a choice twice
            return choices.index(answer) if choices.count(answer) == 1 else None
        letter = LETTERS.find(answer.strip().upper()) if len(answer.strip()) == 1 else -1
        return letter if 0 <= letter < len(choices) else None
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and answer % 1 == 0:
        return int(answer) if 0 <= answer < len(choices) else None
    return None
