"""The temperature against brute force, and its effect on predictions."""

import math

import pytest
import torch
from torch.distributions import Normal

import bara
from bara import ClassificationPredictive, RegressionPredictive
from bara.methods import fit_temperature, set_temperature


def test_the_temperature_of_a_mixture_is_that_of_brute_force():
    torch.manual_seed(0)
    logits = 4 * torch.randn(3, 200, 4, dtype=torch.float64)
    labels = (logits.mean(0) + 3 * torch.randn(200, 4)).argmax(-1)
    fitted = fit_temperature(ClassificationPredictive(logits.log_softmax(-1), labels))

    def nll(temperature):
        probability = (logits / temperature).softmax(-1).mean(0)
        return -probability[torch.arange(200), labels].log().mean().item()

    grid = [1 + 0.005 * i for i in range(1000)]
    assert 1.1 < fitted < 5
    assert fitted == pytest.approx(min(grid, key=nll), abs=0.005)
    assert nll(fitted) <= min(map(nll, grid)) + 1e-9


def test_the_temperature_of_a_gaussian_is_its_mean_squared_z():
    """For one draw the optimum is known: T = mean((y - m)^2 / v)."""
    torch.manual_seed(0)
    mean, variance = torch.randn(1, 300), torch.rand(1, 300) + 0.5
    labels = mean[0] + 2 * variance[0].sqrt() * torch.randn(300)
    expected = ((labels - mean[0]).square() / variance[0]).mean().item()
    fitted = fit_temperature(RegressionPredictive(mean, variance, labels))
    assert fitted == pytest.approx(expected, rel=1e-4)


def test_the_temperature_of_a_mixture_of_gaussians():
    torch.manual_seed(1)
    mean, variance = torch.randn(4, 100), torch.rand(4, 100) + 0.1
    labels = torch.randn(100) * 3

    def nll(temperature):
        density = Normal(mean, (variance * temperature).sqrt()).log_prob(labels)
        return -(density.logsumexp(0) - math.log(4)).mean().item()

    fitted = fit_temperature(RegressionPredictive(mean, variance, labels))
    grid = [0.5 + 0.02 * i for i in range(900)]
    assert fitted == pytest.approx(min(grid, key=nll), abs=0.02)


def test_labels_are_needed():
    with pytest.raises(bara.BaraError, match="held-out"):
        fit_temperature(ClassificationPredictive(torch.zeros(1, 2, 2).log_softmax(-1)))


@pytest.mark.parametrize("label", [math.nan, math.inf])
def test_targets_of_which_no_temperature_is_the_best_are_refused(label):
    """Every temperature's likelihood is NaN or 0: the lowest one was taken."""
    labels = torch.tensor([0.0, label, 1.0])
    with pytest.raises(bara.BaraError, match="NaN or infinite"):
        fit_temperature(RegressionPredictive(torch.zeros(2, 3), torch.ones(2, 3), labels))


def test_a_temperature_of_no_label_is_refused():
    none = torch.zeros(1, 0, 2), torch.zeros(0, dtype=torch.long)
    with pytest.raises(bara.BaraError, match="one label or more"):
        fit_temperature(ClassificationPredictive(*none))


@pytest.mark.parametrize(
    ("label", "message"), [(2, "label 2"), (-100, "label -100"), (0.5, "whole")]
)
def test_labels_that_are_no_classes_are_refused(label, message):
    log_probs = torch.zeros(1, 2, 2).log_softmax(-1)
    with pytest.raises(bara.BaraError, match=message):
        fit_temperature(ClassificationPredictive(log_probs, torch.tensor([0, label])))


def test_predict_tempers_every_draw(tiny_bert):
    from helpers import adapt, stir

    model = stir(adapt(tiny_bert, "bara", task_type="SEQ_CLS"))
    batch = {"input_ids": torch.randint(5, 20, (6, 7))}
    plain = bara.predict(model, batch, num_draws=4).log_probs_draws
    set_temperature(model, 2.5)
    tempered = bara.predict(model, batch, num_draws=4).log_probs_draws
    torch.testing.assert_close(tempered, (plain / 2.5).log_softmax(-1), atol=1e-5, rtol=1e-5)
