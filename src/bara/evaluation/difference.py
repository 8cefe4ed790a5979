"""How far two predictions for the same inputs are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bara.errors import BaraError
from bara.prediction.multi_label import MultiLabelPredictive
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
            of spans that between their distributions. Regression: between the predicted means, in
            the target's unit.
        changed: share of the inputs whose most probable class is another; None for regression.
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


def _variation(first: SpanDistribution, second: SpanDistribution) -> float:
    """Total variation between two distributions over the spans of one context."""
    spans = (first.log_probs.exp() - second.log_probs.exp()).abs().sum()
    return 0.5 * float(spans + (first.no_answer.exp() - second.no_answer.exp()).abs())


def _difference(distance: Tensor, changed: Tensor) -> Difference:
    share = changed.double().mean().item()
    return Difference(len(distance), distance.mean().item(), distance.max().item(), share)
