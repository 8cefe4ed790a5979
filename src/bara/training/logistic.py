"""Logistic regression of fixed features, and the width of the prior that suits it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from torch import Tensor
from torch.nn import functional as F

VARIANCES = tuple(float(10 ** (power / 2)) for power in range(-6, 3))
"""Prior variances of a weight that are tried, for features with a mean square of 1."""
PATIENCE = 2
"""Variances in a row that have to be worse than the best for the search to stop."""
NUM_FOLDS = 3
"""Of the cross-validation."""


def logistic_weights(x: Tensor, y: Tensor, variance: float, num_classes: int) -> Tensor:
    """The most probable weights W of multinomial logistic regression, logits = W x.

    Args:
        x: (n, d) features, float64.
        y: (n,) classes.
        variance: of the Gaussian prior of each of the K d weights.
        num_classes: K; the prior decides on a class without a text.

    Returns:
        (K, d), float64.
    """
    # a text of no weight for each class: scikit-learn knows no other classes
    rows = np.concatenate([x.numpy(), np.zeros((num_classes, x.shape[1]))])
    classes = np.concatenate([y.numpy(), np.arange(num_classes)])
    weight = np.concatenate([np.ones(len(y)), np.zeros(num_classes)])
    binary = num_classes == 2  # has one row of weights there, the difference of ours
    model = LogisticRegression(
        C=2 * variance if binary else variance, fit_intercept=False, max_iter=2000, tol=1e-3
    )
    with warnings.catch_warnings():  # few texts are no regression problem
        warnings.filterwarnings("ignore", "The number of unique classes")
        mean = torch.from_numpy(model.fit(rows, classes, sample_weight=weight).coef_)
    return torch.cat([-mean / 2, mean / 2]) if binary else mean


@dataclass(frozen=True)
class Standardised:
    """Features as linear models take them: centred, with a mean square of 1, and a constant.

    Attributes:
        centre: (d,).
        scale: root of the mean square of what is left.
    """

    centre: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Standardised:
        """That of features (n, d)."""
        centre = x.mean(0)
        return cls(centre, (x - centre).square().mean().sqrt().clamp(min=1e-12))

    @property
    def matrix(self) -> Tensor:
        """(d + 1, d + 1): what takes (x, 1) to the features.

        The constant is as long as the other features together, so that the prior hardly holds the
        biases.
        """
        d = len(self.centre)
        matrix = torch.eye(d + 1, dtype=torch.double) / self.scale
        matrix[:d, d] = -self.centre / self.scale
        matrix[d, d] = d**0.5
        return matrix

    def __call__(self, x: Tensor) -> Tensor:
        """(n, d + 1) of (n, d)."""
        return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) @ self.matrix.T


class CrossValidated(NamedTuple):
    """The best logistic regression.

    Attributes:
        variance: of its prior, one of `VARIANCES`.
        nll: mean negative log-likelihood of examples that were left out, in nats.
    """

    variance: float
    nll: float


def best_variance(
    variances: Sequence[float], loss: Callable[[float], float]
) -> tuple[float, float]:
    """The variance of the least loss, and that loss; `PATIENCE` worse ones in a row end it."""
    best, least, worse = variances[0], math.inf, 0
    for variance in variances:
        if (lost := loss(variance)) < least:
            best, least, worse = variance, lost, 0
        elif (worse := worse + 1) == PATIENCE:
            break
    return best, least


def cross_validate(x: Tensor, y: Tensor, num_classes: int) -> CrossValidated | None:
    """The prior's variance that predicts examples best that were left out.

    Args:
        x: (n, d) features, centred here and scaled to a mean square of 1.
        y: (n,) classes.
        num_classes: K.

    Returns:
        None with fewer examples than folds, or features that are all the same.
    """
    x = x.double()
    if len(x) < NUM_FOLDS or not (x - x.mean(0)).any():
        return None
    x = Standardised.of(x)(x)
    folds = list(KFold(NUM_FOLDS, shuffle=True, random_state=0).split(x.numpy()))

    def loss(variance: float) -> float:
        total = 0.0
        for inside, out in folds:
            weights = logistic_weights(x[inside], y[inside], variance, num_classes)
            total += float(F.cross_entropy(x[out] @ weights.T, y[out], reduction="sum"))
        return total

    best, least = best_variance(VARIANCES, loss)
    return CrossValidated(best, least / len(x))
