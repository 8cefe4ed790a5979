"""How good a reward model's preferences are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from bara.evaluation.metrics import Evaluation, measure
from bara.language.preferences import Pair, predict_preferences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate_preferences(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], **options: Any
) -> Evaluation:
    """Accuracy, likelihood and calibration of a reward model on pairs of answers.

    The metrics are those of a classification into `rejected` and `chosen` (see `bara.evaluate`):
    `accuracy` is the share of pairs whose chosen answer is the more probable winner, and a tie
    counts as an error; `nll` is the mean of -log P(chosen beats rejected), in nats.

    Args:
        model, tokenizer, pairs, options: as in `bara.predict_preferences`.

    Raises:
        BaraError: see `bara.predict_preferences`.
    """
    return measure(predict_preferences(model, tokenizer, pairs, **options).choice)
