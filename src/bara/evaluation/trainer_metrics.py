"""Metrics while a `Trainer` trains."""

from __future__ import annotations

from typing import Any

import torch

from bara.errors import BaraError
from bara.evaluation.metrics import classification_metrics, regression_metrics
from bara.prediction.likelihood import MIN_LOG_VARIANCE
from bara.prediction.predictive import ClassificationPredictive, RegressionPredictive


def compute_metrics(prediction: Any) -> dict[str, float]:
    """For `Trainer(compute_metrics=bara.compute_metrics)`: calibration beside accuracy.

    The predictions are those of the posterior mean, as `Trainer` evaluates; `bara.evaluate`
    measures the mixture over draws.

    Args:
        prediction: transformers' `EvalPrediction`: logits (n, C) and classes (n,), or for a
            regression mean and log-variance (n, 2) and targets (n,), which are measured in the
            units in which the model was trained.

    Returns:
        What `bara.evaluate` measures of a classifier or a regression, `ece` among them. `Trainer`
        logs them as `eval_ece` and so on.

    Raises:
        BaraError: the logits are of another shape, such as a language model's.
    """
    given = prediction.predictions
    logits = torch.as_tensor(given[0] if isinstance(given, (tuple, list)) else given).float()
    labels = torch.as_tensor(prediction.label_ids)
    regression = labels.is_floating_point()
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    if logits.dim() != 2 or labels.dim() != 1 or (regression and logits.shape[1] != 2):
        raise BaraError(
            "compute_metrics is for classifiers (logits (n, C), classes (n,)) and regressions with "
            f"mean and log-variance, not for logits {tuple(logits.shape)} and labels "
            f"{tuple(labels.shape)}; `bara evaluate` measures language models"
        )
    if not regression:
        log_probs = logits.log_softmax(-1).unsqueeze(0)
        return classification_metrics(ClassificationPredictive(log_probs, labels))
    mean, log_variance = logits.unbind(1)
    variance = log_variance.clamp_min(MIN_LOG_VARIANCE).exp()
    return regression_metrics(
        RegressionPredictive(mean.unsqueeze(0), variance.unsqueeze(0), labels)
    )
