"""How far two predictions for the same inputs are apart."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bara.draws.portions import Portions
from bara.draws.sharing import evaluating
from bara.errors import BaraError
from bara.language.evaluation import next_tokens
from bara.prediction.batches import Collate, batches
from bara.prediction.multi_label import MultiLabelPredictive
from bara.prediction.outputs import accepted
from bara.prediction.predictive import ClassificationPredictive, Predictive, RegressionPredictive
from bara.prediction.spans import SpanDistribution, SpanPredictive
from bara.prediction.words import TokenPredictive


@dataclass(frozen=True)
class Difference:
    """The distance between two predictions of n inputs.

    Attributes:
        num_inputs: n.
        mean, largest: mean and largest distance over the inputs. Classification: total variation
            between the class probabilities, in [0, 1]; of an input's words or labels their mean;
            of a text that between the next tokens' distributions, the mean over its labels; of
            spans that between their distributions. Regression: between the predicted means, in the
            target's unit.
        changed: share of the inputs whose most probable class is another (of a text any token);
            None for regression.
    """

    num_inputs: int
    mean: float
    largest: float
    changed: float | None

    def __str__(self) -> str:
        changed = "" if self.changed is None else f", {self.changed:.1%} predicted otherwise"
        return f"mean {self.mean:.2g}, largest {self.largest:.2g}{changed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dict(vars(self))


def difference(first: Predictive, second: Predictive) -> Difference:
    """The distance between two predictions for the same inputs.

    Raises:
        BaraError: they are of different kinds.
    """
    if isinstance(first, ClassificationPredictive) and isinstance(second, ClassificationPredictive):
        distance = 0.5 * (first.probs - second.probs).abs().sum(-1)
        return _difference(distance, first.prediction != second.prediction)
    if isinstance(first, RegressionPredictive) and isinstance(second, RegressionPredictive):
        distance = (first.mean - second.mean).abs()
        return Difference(len(distance), distance.mean().item(), distance.max().item(), None)
    if isinstance(first, TokenPredictive) and isinstance(second, TokenPredictive):
        variation = 0.5 * (first.words.probs - second.words.probs).abs().sum(-1)
        others = (first.words.prediction != second.words.prediction).float()
        sums = torch.zeros(2, len(first.lengths))
        sums.index_add_(1, first.owners, torch.stack([variation, others]))
        return _difference(sums[0] / first.lengths.clamp(min=1), sums[1] > 0)
    if isinstance(first, MultiLabelPredictive) and isinstance(second, MultiLabelPredictive):
        distance = (first.probs - second.probs).abs().mean(-1)
        others = (first.prediction != second.prediction).any(-1)
        return _difference(distance, others)
    if isinstance(first, SpanPredictive) and isinstance(second, SpanPredictive):
        distance = torch.tensor(
            [
                _variation(first.distribution(i), second.distribution(i))
                for i in range(len(first.passages))
            ]
        )
        pairs = zip(first.answers, second.answers, strict=True)
        return _difference(distance, torch.tensor([a.spans[0] != b.spans[0] for a, b in pairs]))
    raise BaraError("Predictions of different kinds cannot be compared.")


def token_differences(
    mixtures: Sequence[tuple[nn.Module, Portions]],
    pairs: Sequence[tuple[int, int]],
    data: Any,
    *,
    batch_size: int = 64,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
) -> list[Difference]:
    """The distances between what language models expect next, where texts have labels.

    Args:
        mixtures: models and draws of them.
        pairs: numbers of the two mixtures of each distance.
        data: texts with labels, as in `bara.predict`.
        batch_size, collate_fn, progress: as in `bara.predict`.

    Raises:
        BaraError: data that cannot be used or has no labels, or logits that are not finite.
    """
    sums: list[Tensor] = []  # (pairs, 3, inputs): variation, other tokens, labels
    takes = accepted(mixtures[0][0])
    size = max(1, batch_size // max(draws.num_draws for _, draws in mixtures))
    with ExitStack() as stack:
        for model in {model for model, _ in mixtures}:
            stack.enter_context(evaluating(model))
        for batch, index in batches(data, mixtures[0][0], size, collate_fn, progress):
            read = {k: v for k, v in batch.items() if takes is None or k in takes}
            found = [next_tokens(model, draws, read, batch_size) for model, draws in mixtures]
            for i, j in pairs:
                first, second = found[i].log_probs, found[j].log_probs
                variation = 0.5 * (first.exp() - second.exp()).abs().sum(-1)
                others = (first.argmax(-1) != second.argmax(-1)).float()
                rows = torch.zeros(3, len(index), device=first.device)
                values = torch.stack([variation, others, torch.ones_like(others)])
                sums.append(rows.index_add_(1, found[i].rows, values).cpu())
    differences = []
    for number in range(len(pairs)):
        variation, others, labels = torch.cat(sums[number :: len(pairs)], 1)
        if not labels.any():
            raise BaraError("none of the texts has a label to measure at")
        differences.append(_difference(variation / labels.clamp(min=1), others > 0))
    return differences


def _variation(first: SpanDistribution, second: SpanDistribution) -> float:
    """Total variation between two distributions over the spans of one context."""
    spans = (first.log_probs.exp() - second.log_probs.exp()).abs().sum()
    return 0.5 * float(spans + (first.no_answer.exp() - second.no_answer.exp()).abs())


def _difference(distance: Tensor, changed: Tensor) -> Difference:
    share = changed.double().mean().item()
    return Difference(len(distance), distance.mean().item(), distance.max().item(), share)
