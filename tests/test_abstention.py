"""The guarantee of bara.calibrate_threshold, by simulation with known risks."""

import json
import math

import pytest
import torch
from scipy.stats import binom

import bara
from bara import BaraError, ClassificationPredictive
from bara.evaluation.abstention import FILE, Threshold, load_threshold, p_values, save_threshold


def simulated(n, generator, error, noisy=False):
    """Uncertainties uniform on [0, 1], and losses of mean error(u)."""
    u = torch.rand(n, generator=generator)
    wrong = (torch.rand(n, generator=generator) < error(u)).double()
    return u, wrong * torch.rand(n, generator=generator) * 2 * 0.5 if noisy else wrong


def true_risk(threshold, error, scale=1.0):
    """Mean of error(u) over u in [0, threshold]."""
    u = torch.linspace(0, 1, 20001, dtype=torch.float64) * threshold
    return scale * error(u).mean().item()


SHAPES = {
    "rising": lambda u: 0.4 * u,
    "flat at the bound": lambda u: 0 * u + 0.101,
    "confidently wrong": lambda u: torch.where(u < 0.2, 0.3, 0.05 + 0.2 * u),
    "good": lambda u: 0 * u + 0.03,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [80, 400])
def test_the_risk_is_kept_with_the_promised_probability(shape, n):
    error, repeats, broken, answered = SHAPES[shape], 300, 0, []
    generator = torch.Generator().manual_seed(0)
    for seed in range(repeats):
        pair = simulated(n, generator, error)
        threshold = bara.calibrate_threshold(pair, risk=0.1, delta=0.1, seed=seed)
        answered.append(threshold.coverage)
        if threshold.uncertainty is not None:
            broken += true_risk(threshold.uncertainty, error) > 0.1
    # at most delta, and so many by chance with probability 1e-4
    assert broken <= binom.ppf(1 - 1e-4, repeats, 0.1)
    if shape == "good" and n == 400:
        assert sum(answered) / repeats > 0.9
    if shape == "rising" and n == 400:  # the risk is 0.1 at a coverage of one half
        assert 0.1 < sum(answered) / repeats < 0.5


def test_the_risk_is_kept_for_losses_between_0_and_1():
    generator = torch.Generator().manual_seed(0)
    error, broken = SHAPES["rising"], 0
    for seed in range(300):
        pair = simulated(300, generator, error, noisy=True)
        threshold = bara.calibrate_threshold(pair, risk=0.05, delta=0.2, seed=seed)
        if threshold.uncertainty is not None:
            broken += true_risk(threshold.uncertainty, error, 0.5) > 0.05
    assert broken <= binom.ppf(1 - 1e-4, 300, 0.2)


@pytest.mark.parametrize("beta", [None, 0.5])
def test_p_values_are_no_smaller_than_chance(beta):
    """Under a mean loss of exactly the bound P(p <= t) <= t."""
    torch.manual_seed(0)
    repeats, n, risk = 4000, 60, 0.2
    if beta is None:
        losses = (torch.rand(repeats, n) < risk).double()
    else:
        losses = torch.distributions.Beta(beta, beta * 4).sample((repeats, n)).double()
    p = p_values(losses.sum(1), torch.full((repeats,), n), risk, beta is None)
    for t in (0.02, 0.1, 0.3):
        assert (p <= t).double().mean() <= t + 3.5 * (t * (1 - t) / repeats) ** 0.5


def test_a_predictive_uses_its_errors_and_largest_probability():
    torch.manual_seed(0)
    probs = torch.rand(1, 200, 3).softmax(-1)
    labels = torch.where(torch.rand(200) < 0.95, probs[0].argmax(-1), torch.tensor(0))
    predictive = ClassificationPredictive(probs.log(), labels)
    pair = (1 - probs[0].amax(-1), (probs[0].argmax(-1) != labels).double())
    assert bara.calibrate_threshold(predictive).uncertainty == pytest.approx(
        bara.calibrate_threshold(pair).uncertainty
    )


def test_abstains_above_the_threshold_only():
    threshold = Threshold(0.5, 0.1, 0.1, 0.7, 100)
    assert threshold.abstains(torch.tensor([0.2, 0.5, 0.6])).tolist() == [False, False, True]
    never = Threshold(None, 0.1, 0.1, 0.0, 100)
    assert never.abstains(torch.tensor([0.0, 1.0])).all()
    wrong = (torch.rand(200), torch.ones(200))
    assert bara.calibrate_threshold(wrong).uncertainty is None


def test_an_uncertainty_that_is_no_number_is_not_answered():
    threshold = Threshold(0.5, 0.1, 0.1, 1.0, 40)
    assert threshold.abstains(torch.tensor([0.2, math.nan, 0.5, 0.7])).tolist() == [0, 1, 0, 1]
    assert bool(threshold.abstains(math.nan))


def test_saved_beside_the_adapter_and_loaded_under_the_same_conditions(tmp_path):
    first, second = Threshold(0.5, 0.1, 0.1, 0.7, 100), Threshold(0.3, 0.05, 0.1, 0.4, 100)
    save_threshold(tmp_path, first, num_draws=10)
    save_threshold(tmp_path, second, num_draws=10)
    assert load_threshold(tmp_path, 0.1, num_draws=10) == first
    assert load_threshold(tmp_path, 0.05, num_draws=10) == second
    with pytest.raises(BaraError, match="calibrated with num_draws = 10, not 3"):
        load_threshold(tmp_path, 0.1, num_draws=3)
    with pytest.raises(BaraError, match=r"no threshold for the risk 0.2 \(there is one for"):
        load_threshold(tmp_path, 0.2)
    (tmp_path / FILE).write_text(json.dumps({"0.1": {}}))
    with pytest.raises(BaraError, match="damaged"):
        load_threshold(tmp_path, 0.1)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(BaraError, match="damaged"):
        load_threshold(tmp_path, 0.1)


def test_bad_input_is_one_clear_line():
    u, loss = torch.rand(100), torch.zeros(100)
    for options, match in [
        ({"risk": 0.0}, "risk must lie between 0 and 1"),
        ({"delta": 1.0}, "delta must lie between 0 and 1"),
        ({"risk": 0.001}, "100 examples cannot show a risk of 0.001"),
    ]:
        with pytest.raises(BaraError, match=match):
            bara.calibrate_threshold((u, loss), **options)
    with pytest.raises(BaraError, match=r"losses must lie in \[0, 1\]"):
        bara.calibrate_threshold((u, loss + 2))
    with pytest.raises(BaraError, match="NaN"):
        bara.calibrate_threshold((u * float("nan"), loss))
    with pytest.raises(BaraError, match="one number for each"):
        bara.calibrate_threshold((u[:3], loss))
    small = bara.RegressionPredictive(torch.zeros(2, 99), torch.ones(2, 99), torch.full((99,), 0.1))
    with pytest.raises(BaraError, match="a regression has no errors to count"):
        bara.calibrate_threshold(small)
