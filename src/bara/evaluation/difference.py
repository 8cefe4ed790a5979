"""How far two predictions for the same inputs are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bara.errors import BaraError
from bara.prediction.predictive import ClassificationPredictive, Predictive, RegressionPredictive


@dataclass(frozen=True)
class Difference:
    """The distance between two predictions of n inputs.

    Attributes:
        num_inputs: n.
        mean, largest: mean and largest distance over the inputs. Classification: total variation
            between the class probabilities, in [0, 1]. Regression: between the predicted means, in
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
        BaraError: one is a classification and the other a regression.
    """
    if isinstance(first, ClassificationPredictive) and isinstance(second, ClassificationPredictive):
        distance = 0.5 * (first.probs - second.probs).abs().sum(-1)
        changed = (first.prediction != second.prediction).double().mean().item()
        return Difference(len(distance), distance.mean().item(), distance.max().item(), changed)
    if isinstance(first, RegressionPredictive) and isinstance(second, RegressionPredictive):
        distance = (first.mean - second.mean).abs()
        return Difference(len(distance), distance.mean().item(), distance.max().item(), None)
    raise BaraError("A classification and a regression cannot be compared.")
