"""Every distribution against Monte Carlo, torch.distributions or numerical integration."""

import math

import pytest
import torch
from scipy import integrate
from torch.distributions import Bernoulli, Normal, kl_divergence

from bara.posteriors import distributions as d

LOGITS = torch.tensor([-6.0, -1.3, 0.0, 0.7, 2.0, 8.0], dtype=torch.float64)


def logistic(size, seed=0):
    uniform = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return uniform.log() - (1 - uniform).log()


def sampled_gates(logits, draws=400_000):
    # the definition of Louizos et al., written out again
    noise = logistic((draws, 1))
    concrete = 1 / (1 + torch.exp(-(logits + noise) / 0.66))
    return (concrete * 1.2 - 0.1).clip(0, 1)


def test_hard_concrete_draws_follow_the_definition():
    noise = logistic((1000, 1))
    expected = (1 / (1 + torch.exp(-(LOGITS + noise) / 0.66)) * 1.2 - 0.1).clip(0, 1)
    torch.testing.assert_close(d.hard_concrete(LOGITS, noise), expected)


def test_hard_concrete_open_probability_and_mean_match_draws():
    gates = sampled_gates(LOGITS)
    error = 4 * 0.5 / math.sqrt(len(gates))
    opened = torch.sigmoid(d.open_logit(LOGITS))
    torch.testing.assert_close(opened, (gates > 0).double().mean(0), atol=error, rtol=0)
    torch.testing.assert_close(d.hard_concrete_mean(LOGITS), gates.mean(0), atol=error, rtol=0)


def test_hard_concrete_mean_matches_adaptive_integration():
    for logit in LOGITS.tolist():
        mean, _ = integrate.quad(
            lambda v, a=logit: 1 / (1 + math.exp(-(a - 0.66 * math.log((v + 0.1) / (1.1 - v))))),
            0,
            1,
        )
        value = d.hard_concrete_mean(torch.tensor([logit], dtype=torch.float64)).item()
        assert value == pytest.approx(mean, abs=1e-6)


def test_gates_have_exact_zeros_and_gradients():
    logit = torch.zeros(1, requires_grad=True, dtype=torch.float64)
    assert d.hard_concrete(logit, torch.tensor(-9.0)).item() == 0
    assert torch.autograd.gradcheck(
        lambda a: d.hard_concrete(a, torch.tensor([0.3, -0.4], dtype=torch.float64)), logit
    )
    assert torch.autograd.gradcheck(d.hard_concrete_mean, logit)


@pytest.mark.parametrize("prior", [0.1, 0.5, 0.9])
def test_bernoulli_kl(prior):
    expected = kl_divergence(Bernoulli(logits=LOGITS), Bernoulli(torch.tensor(prior).double()))
    torch.testing.assert_close(d.bernoulli_kl(torch.sigmoid(LOGITS), LOGITS, prior), expected)


def test_bernoulli_kl_is_finite_for_extreme_logits():
    logit = torch.tensor([-200.0, 200.0], requires_grad=True)
    value = d.bernoulli_kl(torch.sigmoid(logit), logit, 0.25)
    torch.testing.assert_close(value, torch.tensor([-math.log(0.75), -math.log(0.25)]))
    value.sum().backward()
    assert torch.isfinite(logit.grad).all()


@pytest.mark.parametrize("alpha", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("c", [0.05, 0.25, 1.0])
def test_scale_noise_kl_is_the_gaussian_kl_for_any_mean(alpha, c):
    for theta in (-0.7, 0.01, 3.0):
        q = Normal(torch.tensor(theta), torch.tensor(abs(theta) * alpha**0.5))
        p = Normal(torch.tensor(0.0), torch.tensor(abs(theta) * c**0.5))
        value = d.scale_noise_kl(torch.tensor(alpha), c)
        torch.testing.assert_close(value, kl_divergence(q, p), rtol=1e-4, atol=1e-5)
