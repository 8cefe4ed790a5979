"""The bounds against brute force, and against simulated learning problems."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import beta
from torch.distributions import Bernoulli, kl_divergence

from bara import BaraError
from bara.certificates.bounds import (
    binary_kl,
    binary_kl_inverse,
    complexity_term,
    mean_bound,
    pac_bayes_kl_bound,
)


@pytest.mark.parametrize(("q", "p"), [(0.3, 0.7), (0.0, 0.2), (1.0, 0.9), (0.5, 0.5)])
def test_binary_kl_is_torchs(q, p):
    expected = kl_divergence(
        Bernoulli(torch.tensor(q, dtype=torch.float64)),
        Bernoulli(torch.tensor(p, dtype=torch.float64)),
    )
    assert binary_kl(q, p) == pytest.approx(float(expected), abs=1e-7)


def test_binary_kl_of_the_impossible_is_infinite():
    assert binary_kl(0.3, 0.0) == binary_kl(0.3, 1.0) == math.inf
    assert binary_kl(0.0, 0.0) == binary_kl(1.0, 1.0) == 0


@pytest.mark.parametrize("q", [0.0, 0.02, 0.4, 0.97, 1.0])
@pytest.mark.parametrize("budget", [0.0, 1e-3, 0.1, 2.0])
def test_inverse_against_brute_force(q, budget):
    grid = np.linspace(q, 1, 100_001)
    allowed = [p for p in grid if binary_kl(q, p) <= budget]
    inverse = binary_kl_inverse(q, budget)
    assert inverse == pytest.approx(max(allowed), abs=2e-5)
    assert inverse >= max(allowed) - 1e-12


def test_mean_bound_covers_variables_of_different_means_and_is_not_loose():
    generator = np.random.default_rng(0)
    means = generator.uniform(0, 0.6, size=200)
    delta, trials = 0.1, 4000
    observed = (generator.random((trials, 200)) < means).mean(1)
    failures = np.mean([mean_bound(float(mean), 200, delta) < means.mean() for mean in observed])
    assert failures <= delta
    # never below the exact interval of Clopper and Pearson, and within a few points of it
    for k in (0, 5, 60, 199):
        exact = beta.ppf(1 - delta, k + 1, 200 - k)
        assert exact <= mean_bound(k / 200, 200, delta) < exact + 0.03


def simulated_gaps(num_trials=400, n=40, num_hypotheses=300):
    """Gibbs learning among classifiers that all err half the time: yields (risk, KL, true risk)."""
    generator = np.random.default_rng(1)
    for _ in range(num_trials):
        risks = generator.binomial(n, 0.5, size=num_hypotheses) / n
        posterior = np.exp(-5 * n * (risks - risks.min()))
        posterior /= posterior.sum()
        positive = posterior[posterior > 0]
        kl = float((positive * np.log(positive * num_hypotheses)).sum())
        yield float(posterior @ risks), kl, 0.5, n


def test_the_bound_holds_where_ignoring_the_kl_fails():
    delta = 0.1
    trials = list(simulated_gaps())
    failures = [pac_bayes_kl_bound(risk, kl, n, delta) < true for risk, kl, true, n in trials]
    naive = [pac_bayes_kl_bound(risk, 0.0, n, delta) < true for risk, _, true, n in trials]
    assert np.mean(failures) <= delta
    assert np.mean(naive) > delta


def test_several_priors_cost_their_logarithm():
    one = pac_bayes_kl_bound(0.2, 3.0 + math.log(25), 100, 0.05)
    assert pac_bayes_kl_bound(0.2, 3.0, 100, 0.05, num_priors=25) == pytest.approx(one)
    assert one > pac_bayes_kl_bound(0.2, 3.0, 100, 0.05)


def test_too_few_examples_are_refused():
    with pytest.raises(BaraError, match="at least 8"):
        pac_bayes_kl_bound(0.2, 1.0, 7, 0.05)


def test_complexity_term_is_occams_bound_with_weights_that_sum_to_one():
    rank, width, bits, n, delta = 3, 2, 1, 50, 0.05
    total = 0.0
    for used in range(rank + 1):
        choices = list(combinations(range(rank), used))
        weight = 1 / (rank + 1) / len(choices) / 2 ** (used * width * bits)
        total += weight * len(choices) * 2 ** (used * width * bits)
        occam = math.sqrt(math.log(1 / (weight * delta)) / (2 * n))
        assert complexity_term([used], [rank], [width], n, delta, bits) == pytest.approx(occam)
    assert total == pytest.approx(1)


def test_complexity_term_grows_with_the_effective_rank_of_every_layer():
    terms = [complexity_term([s, 2.0], [8, 8], [20, 30], 100, 0.05) for s in (0.0, 1.5, 4.0, 8.0)]
    assert terms == sorted(terms)
    assert len(set(terms)) == len(terms)
