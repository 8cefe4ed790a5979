"""Numbers of a trained model's predictions, small enough to keep for every cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bara.evaluation.metrics import (
    classification_metrics,
    regression_metrics,
    reliability,
    selective_risk,
)
from bara.prediction.predictive import ClassificationPredictive, Predictive, RegressionPredictive
from bara.ranks.effective_rank import EffectiveRank

COVERAGES = 50
"""Points that are kept of a risk–coverage curve."""


def metrics_of(predictive: Predictive) -> dict[str, float]:
    """The metrics of `bara.evaluate` and, for regression, `spearman_epistemic`: the rank
    correlation of the epistemic variance alone with the absolute error."""
    if isinstance(predictive, ClassificationPredictive):
        return classification_metrics(predictive)
    assert isinstance(predictive, RegressionPredictive)
    metrics = regression_metrics(predictive)
    if predictive.num_draws > 1 and predictive.labels is not None:
        error = (predictive.mean - predictive.labels).abs()
        metrics["spearman_epistemic"] = rank_correlation(predictive.epistemic_variance, error)
    return metrics


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's correlation of (n,) and (n,); 0 if one of them is constant."""
    from torchmetrics.functional import spearman_corrcoef

    return float(spearman_corrcoef(x.float(), y.float()).nan_to_num(0))


def first_draws(predictive: Predictive, count: int) -> Predictive:
    """The mixture of the first `count` draws."""
    if isinstance(predictive, ClassificationPredictive):
        return replace(predictive, log_probs_draws=predictive.log_probs_draws[:count])
    assert isinstance(predictive, RegressionPredictive)
    means, variances = predictive.mean_draws[:count], predictive.variance_draws[:count]
    return replace(predictive, mean_draws=means, variance_draws=variances)


def by_draws(predictive: Predictive, counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """The metrics of the first draws, for each count that there are draws for."""
    return {
        str(count): metrics_of(first_draws(predictive, count))
        for count in counts
        if count <= predictive.num_draws
    }


def curves(predictive: Predictive) -> dict[str, dict[str, list[float | None]]]:
    """What the figures need: reliability in bins, and the risk–coverage curve at some points."""
    coverage, risk = selective_risk(predictive)
    points = torch.linspace(0, len(risk) - 1, min(COVERAGES, len(risk))).round().long()
    result = {
        "risk_coverage": {"coverage": _rounded(coverage[points]), "risk": _rounded(risk[points])}
    }
    if isinstance(predictive, ClassificationPredictive) and predictive.labels is not None:
        confidence, accuracy, count = reliability(predictive.probs, predictive.labels)
        result["reliability"] = {
            "confidence": _rounded(confidence),
            "accuracy": _rounded(accuracy),
            "count": _rounded(count),
        }
    return result


def rank_numbers(rank: EffectiveRank, predictive: Predictive) -> dict[str, Any]:
    """Effective rank by layer, its spread, and whether harder inputs use more of it.

    `rank_error_spearman` is the rank correlation, over the test inputs, of the effective rank with
    the negative log-likelihood (regression: absolute error); absent where all inputs use the same.
    """
    assert predictive.labels is not None
    if isinstance(predictive, ClassificationPredictive):
        error = -predictive.log_prob(predictive.labels)
    else:
        assert isinstance(predictive, RegressionPredictive)
        error = (predictive.mean - predictive.labels).abs()
    numbers = {
        "s_bar": rank.s_bar,
        "s_bar_hard": float(rank.hard.mean()),
        "rank_inputs_sd": float(rank.per_input.std(correction=0)),
        "rank_layers_sd": float(rank.per_layer.std(correction=0)),
        "rank_per_layer": _rounded(rank.per_layer),
    }
    if rank.per_input.min() < rank.per_input.max():
        numbers["rank_error_spearman"] = rank_correlation(rank.per_input, error)
    return numbers


def _rounded(values: Tensor) -> list[float | None]:
    return [None if value != value else round(value, 4) for value in values.double().tolist()]
