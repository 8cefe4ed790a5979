"""bara.review: the order, and the error rate of what is not reviewed."""

import pytest
import torch

import bara
from bara import BaraError, ClassificationPredictive, RegressionPredictive, Threshold


def calibrated(n, seed=0):
    """Predictions whose probabilities are those that the labels follow."""
    generator = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(n, 4, generator=generator)).softmax(-1)
    labels = torch.multinomial(probs, 1, generator=generator).flatten()
    return ClassificationPredictive(probs.log().unsqueeze(0), labels)


def test_the_order_and_the_expected_error_are_those_of_the_definition():
    predictive = calibrated(30)
    found = bara.review(predictive)
    wrong = [1 - max(row) for row in predictive.probs.double().tolist()]
    order = sorted(range(30), key=lambda i: -wrong[i])
    assert found.order.tolist() == order
    torch.testing.assert_close(
        found.uncertainty, torch.tensor([wrong[i] for i in order], dtype=torch.float64)
    )
    assert len(found.expected_error) == 31
    for reviewed in range(30):
        rest = [wrong[i] for i in order[reviewed:]]
        assert float(found.expected_error[reviewed]) == pytest.approx(sum(rest) / len(rest))
    assert float(found.expected_error[30]) == 0
    assert found.wanted is None


def test_the_expected_error_is_the_error_of_the_rest_if_probabilities_are_calibrated():
    predictive = calibrated(20_000)
    found = bara.review(predictive)
    wrong = (predictive.prediction != predictive.labels).double()[found.order]
    for reviewed in (0, 4_000, 10_000):
        rest = wrong[reviewed:]
        expected = float(found.expected_error[reviewed])
        error = (expected * (1 - expected) / len(rest)) ** 0.5
        assert abs(float(rest.mean()) - expected) < 4 * error
    assert found.expected_error[0] > 2 * found.expected_error[10_000]


def test_a_threshold_says_how_many_to_review():
    predictive = calibrated(500)
    threshold = bara.calibrate_threshold(calibrated(2000, seed=1), risk=0.1)
    found = bara.review(predictive, threshold)
    above = threshold.abstains(1 - predictive.probs.amax(-1))
    assert 0 < found.wanted < 500
    assert sorted(found.order[: found.wanted].tolist()) == above.nonzero().flatten().tolist()
    assert found.threshold is threshold
    never = Threshold(None, 0.1, 0.1, 0.0, 100)
    assert bara.review(predictive, never).wanted == 500


def test_a_regression_has_no_error_rate():
    with pytest.raises(BaraError, match="review is for classification"):
        bara.review(RegressionPredictive(torch.zeros(1, 3), torch.ones(1, 3)))
