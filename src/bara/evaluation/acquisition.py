"""Active learning: which inputs of an unlabelled pool to label next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from bara.errors import BaraError
from bara.prediction.predictive import ClassificationPredictive, Predictive, RegressionPredictive

Strategy = Literal["batch", "bald", "entropy", "diversity"]
FEATURES = ("batch", "diversity")
"""Strategies that need features."""
ROUNDING = 1e-14
"""Mutual information, nats, of draws that are equal but for rounding."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Inputs to label, and what all inputs of the pool were judged by.

    Attributes:
        index: (k,) positions in the pool, the first to label first.
        bald: (n,) mutual information of the label and the draw, nats: what labelling an input is
            expected to tell about the model.
        entropy: (n,) entropy of the predictive distribution, nats; of a density for regression,
            which may be negative.
    """

    index: Tensor
    bald: Tensor
    entropy: Tensor


def select(
    predictive: Predictive,
    k: int,
    *,
    by: Strategy = "batch",
    features: Tensor | None = None,
    seed: int = 0,
) -> Selection:
    """Chooses k inputs of an unlabelled pool whose labels to ask for.

    - ``bald``: the largest mutual information (Houlsby et al. 2011, arXiv 1112.5745). The k best
      one by one may be much alike.
    - ``entropy``: the most uncertain, whatever the reason.
    - ``diversity``: spread over the pool: the centres that k-means++ starts from (Arthur &
      Vassilvitskii 2007), by their distance in the features; uncertainty plays no part.
    - ``batch``: the same with every input weighted by its mutual information, so that the chosen
      ones are informative and differ; in the manner of BADGE (Ash et al. 2020, arXiv 1906.03671).

    For regression the mixture counts as a Gaussian of its variance, whose entropy is at least the
    mixture's, so that both scores are upper bounds there.

    Args:
        predictive: of the pool.
        k: how many.
        by: the strategy.
        features: (n, d), `bara.adapter_features` of the pool; `diversity` and `batch` need them.
        seed: of k-means++.

    Raises:
        BaraError: k is not between 1 and n, the strategy is unknown, features are missing or of
            another shape, or the draws agree everywhere, so that nothing is known of the model's
            own uncertainty (`bald`, `batch`).
    """
    check_strategy(by)
    bald, entropy = _scores(predictive)
    check_count(k, len(bald))
    if by in ("bald", "batch") and not (bald > ROUNDING).any():
        raise BaraError(
            f"{by} needs draws that differ, and this model's agree on every input (--by): choose "
            "by entropy, or train a method that has a posterior"
        )
    if by in FEATURES:
        order = _spread(_checked(features, len(bald), by), k, bald if by == "batch" else None, seed)
    else:
        score = bald if by == "bald" else entropy
        order = score.argsort(descending=True, stable=True)[:k]
    return Selection(order, bald, entropy)


def check_strategy(name: str) -> Strategy:
    """The strategy of this name.

    Raises:
        BaraError: there is none.
    """
    if name not in get_args(Strategy):
        raise BaraError(f"by must be one of {', '.join(get_args(Strategy))}, not {name!r} (--by)")
    return cast(Strategy, name)


def check_count(k: int, inputs: int) -> None:
    """Raises BaraError for a choice of fewer than 1 or more than all inputs of a pool."""
    if not 1 <= k <= inputs:
        raise BaraError(f"k must lie between 1 and the {inputs} inputs of the pool, not {k} (--k)")


def _scores(predictive: Predictive) -> tuple[Tensor, Tensor]:
    """(n,) mutual information and (n,) entropy."""
    if isinstance(predictive, ClassificationPredictive):
        # a difference of entropies: in float32 little of a small one would be left
        exact = ClassificationPredictive(predictive.log_probs_draws.double())
        return exact.epistemic_uncertainty, exact.total_uncertainty
    if not isinstance(predictive, RegressionPredictive):
        raise BaraError("select is for classification, multiple choice and regression")
    noise = predictive.variance_draws.double()
    total = RegressionPredictive(predictive.mean_draws.double(), noise).variance
    if (noise == 0).any():
        raise BaraError("a noise variance of 0 has no entropy: give noise_variance a value > 0")
    bald = 0.5 * (total / noise).log().mean(0).clamp(min=0)  # below 0 by rounding alone
    return bald, 0.5 * (2 * math.pi * math.e * total).log()


def _checked(features: Tensor | None, rows: int, by: str) -> Tensor:
    if features is None or features.dim() != 2 or len(features) != rows:
        shape = None if features is None else tuple(features.shape)
        raise BaraError(
            f"{by} needs features of the shape ({rows}, d), one row for each input of the pool "
            f"(bara.adapter_features), not {shape}"
        )
    if not features.isfinite().all():
        raise BaraError("the features are not finite: the adapter was damaged")
    return features


def _spread(features: Tensor, k: int, weights: Tensor | None, seed: int) -> Tensor:
    """k different positions by k-means++; the heaviest others where no distance is left."""
    from sklearn.cluster import kmeans_plusplus

    weights = torch.ones(len(features)) if weights is None else weights
    _, chosen = kmeans_plusplus(
        features.double().numpy(),
        k,
        sample_weight=weights.double().numpy(),
        random_state=seed,
    )
    # of inputs that are copies of each other it can take one twice
    rest = weights.argsort(descending=True, stable=True).tolist()
    return torch.tensor(list(dict.fromkeys([*chosen.tolist(), *rest]))[:k])
