"""A model's predictions of labelled data, measured."""

from __future__ import annotations

from typing import Any

from torch import nn

from bara.evaluation.metrics import Evaluation, measure
from bara.prediction.predict import predict


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    ood: Any = None,
    **options: Any,
) -> Evaluation:
    """Predicts labelled data and measures accuracy, calibration and out-of-distribution detection.

    Args:
        model: see `predict`.
        data: labelled data, see `predict`.
        ood: inputs from elsewhere (their labels are not used): adds `ood_auroc` and `ood_fpr95`.
        **options: those of `predict`, `num_draws` and `seed` among them.

    Raises:
        BaraError: labels are missing, or any error of `predict`.
    """
    predictive = predict(model, data, **options)
    elsewhere = None if ood is None else predict(model, ood, **options)
    return measure(predictive, elsewhere)
