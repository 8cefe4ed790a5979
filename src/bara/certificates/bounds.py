"""Bounds on the generalisation error: PAC-Bayes-kl, and a complexity term in the rank.

Numbers in, numbers out; `bara.certificates.certificate` takes them from a model. The
derivations are in docs/certificates.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bara.errors import BaraError

MONTE_CARLO_SHARE = 0.1
"""Part of delta that the estimate of the Gibbs risk may use."""


def binary_kl(q: float, p: float) -> float:
    """KL(Bernoulli(q) || Bernoulli(p)) in nats; infinite where p excludes what q allows."""
    kl = 0.0
    for a, b in ((q, p), (1 - q, 1 - p)):
        if a > 0:
            kl += a * math.log(a / b) if b > 0 else math.inf
    return kl


def binary_kl_inverse(q: float, budget: float) -> float:
    """The largest p in [q, 1] with KL(Bernoulli(q) || Bernoulli(p)) <= budget.

    By bisection, rounded up: the true value is never above what is returned.
    """
    low, high = q, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if binary_kl(q, middle) > budget:
            high = middle
        else:
            low = middle
    return high


def mean_bound(mean: float, num_samples: int, delta: float) -> float:
    """Upper bound on the expected mean of independent variables in [0, 1].

    They need not have the same distribution. Holds with probability 1 - delta.

    Source: Hoeffding 1963, theorem 1 (the Chernoff bound), doi:10.1080/01621459.1963.10500830.
    """
    return binary_kl_inverse(mean, math.log(1 / delta) / num_samples)


def pac_bayes_kl_bound(
    gibbs_risk: float, kl: float, n: int, delta: float, num_priors: int = 1
) -> float:
    """Upper bound on the Gibbs risk: kl(empirical || true) <= (KL + log(2 K sqrt(n) / delta)) / n.

    Holds with probability 1 - delta over n independent examples, for all posteriors and all K
    priors at once.

    Source: Maurer 2004 (arXiv cs/0411099), theorem 5; n >= 8.

    Args:
        gibbs_risk: the posterior's mean loss in [0, 1] on the n examples, or an upper bound of it.
        kl: KL(posterior || prior) in nats, to any of the priors.
        n: number of examples that the priors have not seen.
        delta: probability of failure.
        num_priors: K.

    Raises:
        BaraError: n < 8.
    """
    if n < 8:
        raise BaraError(f"the PAC-Bayes-kl bound needs at least 8 examples, not {n}")
    budget = (kl + math.log(2 * num_priors * math.sqrt(n) / delta)) / n
    return binary_kl_inverse(gibbs_risk, budget)


def complexity_term(
    ranks: Sequence[float],
    max_ranks: Sequence[int],
    widths: Sequence[int],
    n: int,
    delta: float,
    bits: int = 16,
) -> float:
    """How far, by Occam's bound, the test error of an adapter of these ranks may be above training.

        sqrt( ( sum_l [s_l (d_in + d_out)_l bits log 2 + log C(r_l, s_l) + log(r_l + 1)]
                + log(1 / delta) ) / 2n )

    Ours, in the manner of what BaRA's abstract says (arXiv 2606.29184): it grows with the effective
    rank and not with the maximum. For whole ranks, the same for every input, and entries of `bits`
    bits it is a theorem (Langford 2005, JMLR 6); for soft or input-dependent ranks it is a scale
    to compare adapters by.

    Args:
        ranks: effective rank s_l of each layer, in [0, r_l].
        max_ranks: maximum rank r_l of each layer.
        widths: d_in + d_out of each layer.
        n: number of training examples.
        delta: probability of failure.
        bits: bits that store one entry of A or B.
    """
    total = math.log(1 / delta)
    for rank, maximum, width in zip(ranks, max_ranks, widths, strict=True):
        choices = math.lgamma(maximum + 1) - math.lgamma(rank + 1) - math.lgamma(maximum - rank + 1)
        total += rank * width * bits * math.log(2) + choices + math.log(maximum + 1)
    return math.sqrt(total / (2 * n))
