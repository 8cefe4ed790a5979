"""Selective review: what a person should look at first, and how good the rest then is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bara.errors import BaraError
from bara.evaluation.abstention import Threshold
from bara.prediction.predictive import ClassificationPredictive, Predictive


@dataclass(frozen=True, eq=False)
class Review:
    """Predictions in the order in which to look at them.

    Attributes:
        order: (n,) positions of the inputs, the most uncertain first.
        uncertainty: (n,) 1 - largest probability, in that order.
        expected_error: (n + 1,) expected error rate of what is left when the first 0, 1, …, n are
            reviewed, if the probabilities are calibrated; 0 when all are.
        wanted: how many the calibrated threshold asks to review: all above it; None without one.
        threshold: its `risk` bounds the error rate of the rest, with probability 1 - delta over
            its calibration data, whether or not the probabilities are calibrated.
    """

    order: Tensor
    uncertainty: Tensor
    expected_error: Tensor
    wanted: int | None = None
    threshold: Threshold | None = None


def review(predictive: Predictive, threshold: Threshold | None = None) -> Review:
    """Sorts predictions by their uncertainty, for a person to look at the first ones.

    Args:
        predictive: of a classifier or multiple choice; labels are not used.
        threshold: of `bara.calibrate_threshold`, of the same model and draws.

    Raises:
        BaraError: the predictions are of a regression.
    """
    if not isinstance(predictive, ClassificationPredictive):
        raise BaraError("review is for classification and multiple choice, which have error rates")
    uncertainty, order = (1 - predictive.probs.double().amax(-1)).sort(descending=True, stable=True)
    left = uncertainty.flip(0).cumsum(0).flip(0)  # errors expected among what is not reviewed
    expected = torch.cat([left / torch.arange(len(left), 0, -1), torch.zeros(1)])
    if threshold is None:
        return Review(order, uncertainty, expected)
    # float32, as the threshold was found and as `bara predict` abstains
    declined = threshold.abstains(1 - predictive.probs.amax(-1))
    return Review(order, uncertainty, expected, int(declined.sum()), threshold)
