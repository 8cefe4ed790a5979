"""The mixture over draws against explicit sums, `torch.distributions` and samples."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from bara.errors import BaraError
from bara.prediction.predictive import ClassificationPredictive, RegressionPredictive


@pytest.fixture
def classes() -> ClassificationPredictive:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 7, 4, generator=generator)
    return ClassificationPredictive(logits.log_softmax(-1), torch.arange(7) % 4, tuple("abcd"))


@pytest.fixture
def targets() -> RegressionPredictive:
    generator = torch.Generator().manual_seed(1)
    means = 10 + 2 * torch.randn(6, 8, generator=generator)
    variances = 0.1 + torch.rand(6, 8, generator=generator)
    return RegressionPredictive(means, variances, means.mean(0) + 0.5)


def mixture(predictive: RegressionPredictive) -> MixtureSameFamily:
    means, variances = predictive.mean_draws.double().T, predictive.variance_draws.double().T
    return MixtureSameFamily(
        Categorical(logits=torch.zeros_like(means)), Normal(means, variances.sqrt())
    )


def test_class_probabilities_are_the_mean_over_draws(classes):
    mean = classes.log_probs_draws.double().exp().mean(0)
    torch.testing.assert_close(classes.probs.double(), mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(classes.log_probs.double(), mean.log(), atol=1e-5, rtol=0)
    assert classes.prediction.tolist() == mean.argmax(-1).tolist()


def test_uncertainty_splits_by_explicit_sums(classes):
    draws = classes.log_probs_draws.double().exp().tolist()
    for i in range(7):
        mean = [sum(draw[i][c] for draw in draws) / 5 for c in range(4)]
        total = -sum(p * math.log(p) for p in mean)
        aleatoric = -sum(p * math.log(p) for draw in draws for p in draw[i]) / 5
        # I(class; draw) = sum over both of p(draw) p(class | draw) log p(class | draw) / p(class)
        information = sum(
            draw[i][c] * math.log(draw[i][c] / mean[c]) / 5 for draw in draws for c in range(4)
        )
        assert classes.total_uncertainty[i].item() == pytest.approx(total, abs=1e-5)
        assert classes.aleatoric_uncertainty[i].item() == pytest.approx(aleatoric, abs=1e-5)
        assert classes.epistemic_uncertainty[i].item() == pytest.approx(information, abs=1e-5)


def test_one_draw_has_no_epistemic_uncertainty_and_certainty_has_none_at_all():
    one = ClassificationPredictive(torch.randn(1, 50, 3).log_softmax(-1))
    assert (one.epistemic_uncertainty >= 0).all()
    assert one.epistemic_uncertainty.max() < 1e-6
    certain = ClassificationPredictive(torch.tensor([[[0.0, -torch.inf]]]))
    assert certain.total_uncertainty.item() == certain.aleatoric_uncertainty.item() == 0


def test_class_records_survive_json(classes):
    records = json.loads(json.dumps(classes.to_records()))
    assert len(records) == 7
    record = records[2]
    assert list(record["probabilities"]) == ["a", "b", "c", "d"]
    assert record["prediction"] == max(record["probabilities"], key=record["probabilities"].get)
    assert record["total"] == pytest.approx(record["aleatoric"] + record["epistemic"], abs=1e-5)
    named = replace(classes, label_names=("w", "x", "y", "z"))
    assert list(named.to_records()[0]["probabilities"]) == list("wxyz")


@pytest.mark.parametrize("index", [slice(2, 4), [2, 3], torch.arange(7).div(2).floor() == 1])
def test_select(classes, index):
    part = classes.select(index)
    torch.testing.assert_close(part.probs, classes.probs[2:4])
    assert part.labels.tolist() == [2, 3]
    assert part.label_names == classes.label_names


def test_gaussian_mixture_moments_and_density(targets):
    reference = mixture(targets)
    torch.testing.assert_close(targets.mean.double(), reference.mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(targets.variance.double(), reference.variance, rtol=1e-4, atol=0)
    values = targets.labels
    torch.testing.assert_close(
        targets.log_prob(values).double(), reference.log_prob(values.double()), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        targets.epistemic_variance,
        ((targets.mean_draws - targets.mean) ** 2).sum(0) / targets.num_draws,
    )


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 0.999])
def test_interval_inverts_the_mixture_cdf(targets, level):
    lower, upper = targets.interval(level)
    reference = mixture(targets)
    for end, probability in ((lower, (1 - level) / 2), (upper, (1 + level) / 2)):
        expected = torch.full((8,), probability, dtype=torch.float64)
        torch.testing.assert_close(reference.cdf(end.double()), expected, atol=1e-5, rtol=0)


def test_interval_holds_its_share_of_samples(targets):
    torch.manual_seed(0)
    samples = mixture(targets).sample((20_000,))
    lower, upper = targets.interval(0.8)
    inside = ((samples >= lower) & (samples <= upper)).double().mean(0)
    assert (inside - 0.8).abs().max() < 0.015


def test_interval_of_one_draw_without_noise_is_the_point_itself():
    point = RegressionPredictive(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
    lower, upper = point.interval()
    assert lower.tolist() == upper.tolist() == [1, 2]
    with pytest.raises(BaraError, match="noise_variance"):
        point.log_prob(torch.tensor([1.0, 2.0]))


def test_regression_records_and_select(targets):
    record = json.loads(json.dumps(targets.select([3]).to_records()))[0]
    assert record["lower"] < record["prediction"] < record["upper"]
    assert record["total"] == pytest.approx(record["aleatoric"] + record["epistemic"])
    assert record["prediction"] == pytest.approx(targets.mean[3].item())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassificationPredictive(torch.zeros(3, 4)), "draws, inputs, classes"),
        (lambda: ClassificationPredictive(torch.zeros(2, 3, 1)), "two classes"),
        (lambda: ClassificationPredictive(torch.zeros(0, 3, 2)), "at least one draw"),
        (lambda: ClassificationPredictive(torch.zeros(1, 3, 2), torch.zeros(2)), "labels must be"),
        (lambda: ClassificationPredictive(torch.zeros(1, 3, 2), None, ("a", "a")), "different"),
        (
            lambda: ClassificationPredictive(torch.tensor([[[0.0, 0.0], [torch.nan, 0.0]]])),
            "NaN for 1 of 2 inputs .the first is number 1.",
        ),
        (lambda: RegressionPredictive(torch.zeros(2, 3), torch.zeros(3)), "draws, inputs"),
        (lambda: RegressionPredictive(torch.zeros(1, 3), -torch.ones(1, 3)), "negative"),
        (lambda: RegressionPredictive(torch.full((1, 3), torch.nan), torch.ones(1, 3)), "NaN"),
        (lambda: RegressionPredictive(torch.zeros(1, 1), torch.ones(1, 1)).interval(1), "level"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(BaraError, match=message):
        make()
