"""Metrics against loops written out by hand."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bara.errors import BaraError
from bara.evaluation.metrics import (
    Evaluation,
    classification_metrics,
    regression_metrics,
    reliability,
    risk_coverage,
    selective_risk,
)
from bara.prediction.predictive import ClassificationPredictive, RegressionPredictive


def classifier(scale=2.0, n=400, seed=0) -> ClassificationPredictive:
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(n, 3, generator=generator)
    labels = torch.multinomial(signal.softmax(-1), 1, generator=generator)[:, 0]
    draws = scale * signal + torch.randn(4, n, 3, generator=generator)
    return ClassificationPredictive(draws.log_softmax(-1), labels)


def calibration_error(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    confidence, right = probs.max(1), probs.argmax(1) == labels
    error = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = (confidence >= low) & ((confidence < high) | (b == bins - 1))
        if inside.any():
            error += abs(confidence[inside].mean() - right[inside].mean()) * inside.mean()
    return error


@pytest.mark.parametrize("scale", [0.3, 2.0, 100.0])  # at 100 many probabilities are exactly 1
def test_classification_against_loops(scale):
    predictive = classifier(scale)
    probs, labels = predictive.probs.double().numpy(), predictive.labels.numpy()
    metrics = classification_metrics(predictive)
    assert metrics["accuracy"] == pytest.approx((probs.argmax(1) == labels).mean())
    assert metrics["ece"] == pytest.approx(calibration_error(probs, labels), abs=1e-5)
    brier = np.mean([((p - np.eye(3)[y]) ** 2).sum() for p, y in zip(probs, labels, strict=True)])
    assert metrics["brier"] == pytest.approx(brier, rel=1e-5)
    exact = predictive.log_probs_draws.double().logsumexp(0) - math.log(4)
    nll = -np.mean([exact[i, y].item() for i, y in enumerate(labels)])
    assert metrics["nll"] == pytest.approx(nll, rel=1e-5)


def test_probabilities_that_rounding_put_above_one_are_no_logits():
    log_probs = torch.tensor([[[2e-7, -16.0, -16.0], [-0.7, -0.9, -2.37]]])
    metrics = classification_metrics(ClassificationPredictive(log_probs, torch.tensor([0, 0])))
    assert metrics["ece"] == pytest.approx((1 - math.exp(-0.7)) / 2, abs=1e-4)


def test_reliability_bins_add_up_to_the_calibration_error():
    predictive = classifier()
    confidence, accuracy, count = reliability(predictive.probs, predictive.labels, bins=10)
    assert len(count) == 10
    assert count.sum() == 400
    assert torch.equal(confidence.isnan(), count == 0)
    used = count > 0
    assert (confidence[used] >= torch.arange(10)[used] / 10).all()
    error = ((confidence - accuracy).abs() * count)[used].sum().item() / 400
    expected = calibration_error(predictive.probs.numpy(), predictive.labels.numpy(), bins=10)
    assert error == pytest.approx(expected, abs=1e-5)


def test_risk_coverage_is_the_mean_loss_of_the_surest():
    generator = torch.Generator().manual_seed(0)
    uncertainty, loss = torch.rand(2, 50, generator=generator)
    coverage, risk = risk_coverage(uncertainty, loss)
    order = sorted(range(50), key=lambda i: uncertainty[i])
    for k in range(1, 51):
        assert coverage[k - 1].item() == pytest.approx(k / 50)
        expected = sum(loss[i].item() for i in order[:k]) / k
        assert risk[k - 1].item() == pytest.approx(expected)


def test_risk_coverage_of_ties_is_the_expectation_over_their_orders():
    uncertainty = torch.tensor([0.5, 0.1, 0.5, 0.5, 0.9])
    loss = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    orders = [[1, a, b, c, 4] for a in (0, 2, 3) for b in (0, 2, 3) for c in (0, 2, 3)]
    orders = [order for order in orders if len(set(order)) == 5]
    risks = [np.cumsum(loss.numpy()[order]) / np.arange(1, 6) for order in orders]
    np.testing.assert_allclose(risk_coverage(uncertainty, loss)[1], np.mean(risks, 0))


def test_aurc_is_the_mean_risk():
    predictive = classifier()
    probs, labels = predictive.probs.numpy(), predictive.labels.numpy()
    wrong = (probs.argmax(1) != labels)[np.argsort(-probs.max(1))]
    expected = np.mean([wrong[:k].mean() for k in range(1, 401)])
    assert classification_metrics(predictive)["aurc"] == pytest.approx(expected, rel=1e-6)
    assert selective_risk(predictive)[1].mean().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_ood_scores_by_scanning_all_thresholds(scale):
    inside, outside = classifier(3.0), classifier(scale, n=150, seed=1)
    metrics = classification_metrics(inside, ood=outside)
    a, b = inside.total_uncertainty.numpy(), outside.total_uncertainty.numpy()
    pairs = (b[:, None] > a).mean() + 0.5 * (b[:, None] == a).mean()
    assert metrics["ood_auroc"] == pytest.approx(pairs)
    thresholds = np.concatenate([a, b])
    false_alarms = min((a >= t).mean() for t in thresholds if (b >= t).mean() >= 0.95)
    assert metrics["ood_fpr95"] == pytest.approx(false_alarms)


def regressor(n=200) -> RegressionPredictive:
    generator = torch.Generator().manual_seed(0)
    variances = (0.1 + torch.rand(n, generator=generator)).expand(5, n)
    means = torch.randn(n, generator=generator) + 0.1 * torch.randn(5, n, generator=generator)
    labels = means[0] + variances[0].sqrt() * torch.randn(n, generator=generator)
    return RegressionPredictive(means, variances, labels)


def test_regression_against_loops():
    predictive = regressor()
    metrics = regression_metrics(predictive)
    mean, labels = predictive.mean_draws.double().numpy().mean(0), predictive.labels.numpy()
    error = mean - labels
    variance = predictive.variance.numpy()
    assert metrics["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert metrics["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    densities = [
        np.mean(
            [
                math.exp(-((y - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
                for m, v in zip(
                    predictive.mean_draws[:, i].tolist(),
                    predictive.variance_draws[:, i].tolist(),
                    strict=True,
                )
            ]
        )
        for i, y in enumerate(labels.tolist())
    ]
    assert metrics["nll"] == pytest.approx(-np.log(densities).mean(), rel=1e-4)
    squared = (error**2)[np.argsort(variance)]
    expected = np.mean([squared[:k].mean() for k in range(1, 201)])
    assert metrics["aurc"] == pytest.approx(expected, rel=1e-4)
    assert metrics["spearman"] == pytest.approx(
        spearmanr(variance, np.abs(error)).statistic, abs=1e-4
    )
    # The data come from the predictive distribution itself.
    assert metrics["coverage_90"] == pytest.approx(0.9, abs=0.06)


def test_equal_variances_rank_nothing():
    predictive = RegressionPredictive(torch.zeros(1, 20), torch.ones(1, 20), torch.randn(20))
    assert regression_metrics(predictive)["spearman"] == 0


def test_labels_argument_comes_before_the_predictions_own():
    predictive = classifier()
    right = classification_metrics(predictive, labels=predictive.prediction)
    assert right["accuracy"] == 1


def test_evaluation_prints_and_serialises():
    predictive = classifier()
    evaluation = Evaluation(classification_metrics(predictive), predictive)
    assert json.loads(json.dumps(evaluation.to_dict())) == evaluation.metrics
    assert f"accuracy  {evaluation.metrics['accuracy']:.4f}" in str(evaluation)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda: classification_metrics(ClassificationPredictive(torch.zeros(1, 3, 2))), "labels"),
        (lambda: classification_metrics(classifier(n=4).select([])), "nothing to evaluate"),
        (lambda: classification_metrics(classifier(n=4), torch.tensor([0, 1, 3, 2])), "label 3"),
        (lambda: classification_metrics(classifier(n=2), torch.tensor([0, -100])), "label -100"),
        (lambda: classification_metrics(classifier(n=2), torch.tensor([0.0, 0.5])), "whole"),
        (lambda: classification_metrics(classifier(n=4), torch.tensor([0])), "4 inputs"),
        (
            lambda: classification_metrics(classifier(n=4), ood=classifier(n=4).select([])),
            "out-of-distribution",
        ),
        (lambda: regression_metrics(regressor(3), torch.tensor([1, torch.nan, 2])), "NaN"),
        (lambda: regression_metrics(regressor(3), torch.tensor([1, torch.inf, 2])), "infinite"),
        (lambda: risk_coverage(torch.zeros(2), torch.zeros(3)), "shapes"),
    ],
)
def test_unusable_input_is_refused(compute, message):
    with pytest.raises(BaraError, match=message):
        compute()
