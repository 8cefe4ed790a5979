"""Training on multiple choice: the likelihood of the right choice among the choices.

The loss is that of what `bara.multiple_choice` predicts, the softmax over the choices' mean
log-probabilities. A question is one row: its prompt, then all choices one after the other, each
seeing the prompt and itself alone. The prompt is encoded once, and one draw serves all choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from bara.errors import BaraError
from bara.language.multiple_choice import encode_choices, multiple_choice
from bara.language.question import Question
from bara.prediction.temperature import fit_temperature

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from bara.language.tasks import LanguageTask

MOST_QUESTIONS = 200
"""As many as `base_temperature` is fitted to."""
PADDING = -1
"""Segment of a position that is no token; 0 is the prompt, then come the choices."""


def tokenise_choices(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: LanguageTask,
    *,
    window: int | None = None,
) -> Dataset:
    """A row for each question: `input_ids`, `position_ids`, `segments` and `labels`, the answer.

    Args:
        dataset: the questions.
        tokenizer: the model's.
        task: how choices are scored, and the most tokens of a prompt with one choice.
        window: the model's sliding window, which packed rows do not have.

    Raises:
        BaraError: a row is no question, has no answer, or a choice with the prompt is longer than
            `task.max_length` or the window; the message has its number.
    """
    from datasets import Dataset

    rows = []
    for number, record in enumerate(dataset, start=1):
        where = f"row {number}: the question"
        question = Question.from_record(record, where)
        if question.answer is None:
            raise BaraError(f"{where} has no 'answer'")
        prompt, choices = encode_choices(tokenizer, question, task.scoring)
        longest = len(prompt) + max(map(len, choices))
        task.require_length(number, longest)
        if window is not None and longest > window:
            raise BaraError(
                f"row {number} has {longest} tokens, more than the model's sliding window, "
                f"{window}: shorten it"
            )
        rows.append(_pack(prompt, choices) | {"labels": question.answer})
    if not rows:
        raise BaraError("the data has no rows; give at least one")
    return Dataset.from_list(rows)


def _pack(prompt: list[int], choices: Sequence[list[int]]) -> dict[str, list[int]]:
    ids, positions, segments = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    for number, choice in enumerate(choices, start=1):
        ids += choice
        positions += range(len(prompt), len(prompt) + len(choice))
        segments += [number] * len(choice)
    return {"input_ids": ids, "position_ids": positions, "segments": segments}


class ChoiceCollator:
    """Pads rows of `tokenise_choices` on the right, and lets a position see what it may.

    Args:
        tokenizer: its pad token, or any other, fills the rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = tokenizer.pad_token_id or 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `position_ids` and `segments` (B, T), `labels` (B,), and an
        `attention_mask` (B, 1, T, T) of what is added to the scores."""

        def padded(name: str, value: int) -> Tensor:
            columns = [torch.tensor(row[name]) for row in rows]
            return pad_sequence(columns, batch_first=True, padding_value=value)

        segments = padded("segments", PADDING)
        answers = torch.tensor([row["labels"] for row in rows])
        return {
            "input_ids": padded("input_ids", self.pad),
            "position_ids": padded("position_ids", 0),
            "attention_mask": _mask(segments),
            "segments": segments,
            "labels": answers,
            "shift_labels": answers,  # else Trainer's count of labels leaves out the first
        }


def _mask(segments: Tensor) -> Tensor:
    """0 where a position sees another: an earlier one of the prompt or of its own choice."""
    mine, other = segments.unsqueeze(2), segments.unsqueeze(1)
    size = segments.shape[1]
    seen = ((mine == other) | ((other == 0) & (mine > 0))) & (mine != PADDING)
    seen &= torch.ones(size, size, dtype=torch.bool).tril()
    seen |= torch.eye(size, dtype=torch.bool)  # a row of the softmax needs something to see
    hidden = torch.finfo(torch.bfloat16).min  # finite in every type that models compute in
    return torch.where(seen, 0.0, hidden).unsqueeze(1)


def choice_scores(logits: Tensor, input_ids: Tensor, segments: Tensor) -> Tensor:
    """Mean log-probability of every choice's tokens, (B, C); -inf where a row has fewer choices.

    Args:
        logits: (B, T, V).
        input_ids, segments: (B, T), of `ChoiceCollator`.
    """
    last = (segments == 0).sum(dim=1, keepdim=True) - 1  # of the prompt
    before = torch.arange(segments.shape[1], device=segments.device).expand_as(segments) - 1
    follows = segments == segments.roll(1, dims=1)
    rows, columns = torch.nonzero(segments > 0, as_tuple=True)
    source = torch.where(follows, before, last)[rows, columns]
    log_probs = logits[rows, source].float().log_softmax(-1)
    log_probs = log_probs.gather(1, input_ids[rows, columns].unsqueeze(1)).squeeze(1)
    choice = segments[rows, columns] - 1
    shape = (len(segments), int(segments.max()))
    index = rows * shape[1] + choice
    sums = log_probs.new_zeros(shape[0] * shape[1]).index_add(0, index, log_probs)
    counts = torch.bincount(index, minlength=shape[0] * shape[1])
    means = sums / counts.clamp_min(1)
    return means.masked_fill(counts == 0, -torch.inf).view(shape)


def choice_nll(
    logits: Tensor,
    input_ids: Tensor,
    segments: Tensor,
    answers: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Negative log-likelihood of the answers (B,), in nats, a mean over the questions.

    The probabilities are the softmax of `choice_scores` over the temperature.
    """
    return cross_entropy(choice_scores(logits, input_ids, segments) / temperature, answers)


def base_temperature(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    task: LanguageTask,
    seed: int,
) -> float:
    """The temperature that suits the model before it is trained, fitted to training questions.

    Likelihoods of whole texts are far too sure as scores of choices. The prior of an adapter holds
    it near the base model, which has to be calibrated for that to help. The untrained model has not
    seen the answers, so the training questions, at most `MOST_QUESTIONS` of them, serve as held-out
    ones.
    """
    some = dataset.shuffle(seed=seed).select(range(min(MOST_QUESTIONS, len(dataset))))
    predictive = multiple_choice(
        model,
        tokenizer,
        [Question.from_record(row, "the question") for row in some],
        scoring=task.scoring,
        deterministic=True,
        progress=False,
    )
    return fit_temperature(predictive)
