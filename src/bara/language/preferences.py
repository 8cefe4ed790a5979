"""Reward models: which of two answers is better, and how sure the draws are of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bara.errors import BaraError
from bara.language.prompts import render_chat
from bara.prediction.predict import predict
from bara.prediction.predictive import (
    ClassificationPredictive,
    Predictive,
    RegressionPredictive,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = Mapping[str, Any]
"""`chosen` and `rejected`, and for both a `prompt`: texts, or lists of messages."""
LABEL_NAMES = ("rejected", "chosen")
"""In this order, so that a tie counts as an error."""


@dataclass(frozen=True, eq=False)
class PreferencePredictive(Predictive):
    """Rewards of n pairs of answers under S posterior draws.

    Under a draw the chosen answer beats the rejected one with the probability
    sigmoid(reward of chosen - reward of rejected), of Bradley & Terry (1952,
    doi:10.1093/biomet/39.3-4.324); over draws it is averaged. Rewards have no unit and no zero:
    only their differences mean something.

    Attributes:
        chosen_draws: (S, n) rewards of the chosen answers.
        rejected_draws: (S, n) those of the rejected ones.
    """

    chosen_draws: Tensor
    rejected_draws: Tensor

    def __post_init__(self) -> None:
        if self.chosen_draws.dim() != 2 or self.chosen_draws.shape != self.rejected_draws.shape:
            raise BaraError(
                "chosen_draws and rejected_draws must both have the shape (draws, pairs), not "
                f"{tuple(self.chosen_draws.shape)} and {tuple(self.rejected_draws.shape)}"
            )

    @property
    def num_draws(self) -> int:
        """S."""
        return self.chosen_draws.shape[0]

    @property
    def margin_draws(self) -> Tensor:
        """(S, n) reward of the chosen answer minus that of the rejected one."""
        return self.chosen_draws - self.rejected_draws

    @property
    def margin(self) -> Tensor:
        """(n,) mean over draws of the margin."""
        return self.margin_draws.mean(0)

    @property
    def margin_std(self) -> Tensor:
        """(n,) standard deviation of the margin over the draws (divided by S): epistemic."""
        return self.margin_draws.std(0, correction=0)

    @cached_property
    def choice(self) -> ClassificationPredictive:
        """The pairs as a classification into `rejected` and `chosen`, all labelled `chosen`: its
        uncertainties are in nats, and thresholds for abstaining are calibrated on it."""
        margin = self.margin_draws.float()
        log_probs = torch.stack([F.logsigmoid(-margin), F.logsigmoid(margin)], dim=-1)
        labels = torch.ones(margin.shape[1], dtype=torch.long)
        return ClassificationPredictive(log_probs, labels, LABEL_NAMES)

    @property
    def probs(self) -> Tensor:
        """(n,) probability that the chosen answer beats the rejected one."""
        return self.choice.probs[:, 1]

    @property
    def labels(self) -> Tensor | None:
        """(n,) 1 for every pair: the chosen answer is the better one."""
        return self.choice.labels

    def select(self, index: Tensor | slice | Sequence[int]) -> PreferencePredictive:
        """The pairs at ``index``: a slice, positions, or a (n,) boolean mask."""
        return PreferencePredictive(self.chosen_draws[:, index], self.rejected_draws[:, index])

    def _rows(self) -> list[dict[str, Any]]:
        return self.to_records()

    def to_records(self) -> list[dict[str, Any]]:
        """One dict per pair, for JSON: the probability, both mean rewards, the margin with its
        standard deviation, and `total`, `aleatoric` and `epistemic` uncertainty in nats."""
        columns = {
            "probability": self.probs,
            "chosen": self.chosen_draws.mean(0),
            "rejected": self.rejected_draws.mean(0),
            "margin": self.margin,
            "margin_std": self.margin_std,
            "total": self.choice.total_uncertainty,
            "aleatoric": self.choice.aleatoric_uncertainty,
            "epistemic": self.choice.epistemic_uncertainty,
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]


def predict_preferences(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    max_length: int | None = None,
    **options: Any,
) -> PreferencePredictive:
    """What a reward model thinks of pairs of answers, both of a pair under the same draws.

    Texts are tokenised as TRL's `RewardTrainer` does: conversations by the chat template, plain
    answers behind their prompt with the end-of-text token.

    Args:
        model: a sequence classifier with one output, with an adapter of PEFT or without.
        tokenizer: the model's.
        pairs: mappings with `chosen` and `rejected`, and where both go on from it a `prompt`; all
            texts, or all lists of messages.
        max_length: most tokens of an answer with its prompt; a longer one is refused.
        **options: `num_draws`, `seed`, `deterministic`, `batch_size` and `progress` of
            `bara.predict`.

    Raises:
        BaraError: a pair makes no sense or is too long, the model has not one output, or any error
            of `bara.predict`.
    """
    if isinstance(pairs, Mapping) or not len(pairs):
        raise BaraError("Give a list of pairs with 'chosen' and 'rejected', at least one.")
    sides: dict[str, list[dict[str, list[int]]]] = {"chosen": [], "rejected": []}
    for number, pair in enumerate(pairs, start=1):
        for side, rows in sides.items():
            try:
                ids = _encode(tokenizer, pair.get("prompt"), pair.get(side), side)
            except BaraError as error:
                raise BaraError(f"pair {number}: {error}") from error
            if max_length is not None and len(ids) > max_length:
                raise BaraError(f"pair {number}: {side!r} has {len(ids)} tokens, over {max_length}")
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    rewards = predict(model, sides["chosen"] + sides["rejected"], **options)
    if not isinstance(rewards, RegressionPredictive):
        raise BaraError(
            "A reward model has one output, and this one predicts classes: load it with "
            "num_labels=1."
        )
    return PreferencePredictive(*rewards.mean_draws.split(len(pairs), dim=1))


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Any, answer: Any, side: str) -> list[int]:
    """Token ids of a prompt with an answer."""
    if isinstance(answer, str) and answer.strip() and (prompt is None or isinstance(prompt, str)):
        text, end = (prompt or "") + answer, tokenizer.eos_token or ""
        return list(tokenizer(text if text.endswith(end) else text + end)["input_ids"])
    conversation = isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer)
    if conversation and not isinstance(prompt, str):
        text = render_chat(tokenizer, [*(prompt or ()), *answer])
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    raise BaraError(f"{side!r} must be a text, or messages, and 'prompt' of the same kind")
