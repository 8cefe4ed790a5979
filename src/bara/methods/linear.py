"""Linear models of fixed features with a Gaussian prior: their posterior in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from torch import Tensor
from torch.nn import functional as F

from bara.draws.blocks import log_mean_exp
from bara.errors import BaraError
from bara.methods.weight_draws import Factors
from bara.training.logistic import best_variance, logistic_weights

VARIANCES = [float(10 ** (power / 2)) for power in range(-8, 7)]
"""Prior variances of a weight that are tried, for features with a mean square of 1."""
SHARPENING = [float(10 ** (power / 2)) for power in range(9)]
"""Multiples of the prior's precision that are tried for the covariance."""
NUM_DRAWS = 10
"""Of the posterior, where its predictions are cross-validated."""


@dataclass(frozen=True)
class LinearPosterior:
    """The Gaussian posterior of W in outputs = W x.

    Its precision is (left (x) right) diag(curvature + precision) (left (x) right)^T.

    Attributes:
        mean: (K, d).
        curvature: (K, d), or (1, d) for one output: eigenvalues of the Hessian of the loss.
        left: (K, K) eigenvectors over outputs.
        right: (d, d) eigenvectors over features.
        precision: of the prior of a weight.
        noise: variance of the targets around the output; None for classes.
    """

    mean: Tensor
    curvature: Tensor
    left: Tensor
    right: Tensor
    precision: float
    noise: float | None = None

    @property
    def covariance(self) -> Factors:
        """The covariance of W."""
        return Factors((self.curvature + self.precision).rsqrt(), self.left, self.right)

    def sharper(self, factor: float) -> LinearPosterior:
        """The same mean, with a covariance of a prior that is `factor` times as precise."""
        return replace(self, precision=factor * self.precision)

    def loss(self, x: Tensor, y: Tensor, num_draws: int = 0, seed: int = 0) -> float:
        """Mean negative log-likelihood of labels (n,) for features (n, d), in nats: of the mixture
        over draws, or without draws with the mean weights."""
        weights = self.mean.unsqueeze(0)
        if num_draws:
            generator = torch.Generator().manual_seed(seed)
            shape = (num_draws, *self.mean.shape)
            normal = torch.randn(shape, generator=generator, dtype=self.mean.dtype)
            weights = weights + torch.stack([self.covariance.noise(z) for z in normal])
        outputs = torch.einsum("nd,skd->snk", x, weights)
        if self.noise is None:
            log_likelihood = -F.cross_entropy(
                outputs.flatten(0, 1), y.repeat(len(weights)), reduction="none"
            ).view(len(weights), -1)
        else:
            normal_ = torch.distributions.Normal(outputs[..., 0], math.sqrt(self.noise))
            log_likelihood = normal_.log_prob(y)
        return -float(log_mean_exp(log_likelihood).mean())


Fit = Callable[[Tensor, Tensor, float], LinearPosterior]
"""Makes a posterior of features, labels and the prior's variance."""


def logistic_posterior(x: Tensor, y: Tensor, variance: float, num_classes: int) -> LinearPosterior:
    """Multinomial logistic regression, and its Laplace approximation.

    The Hessian of the loss is a sum over texts of (diag(p) - p p^T) (x) x x^T. It is approximated
    by one Kronecker product, H (x) A with A = sum_i t_i x_i x_i^T, where t_i is the trace of
    diag(p_i) - p_i p_i^T, and H the sum of these matrices over the sum of their traces. That is
    exact for two classes, and for one text.

    Args:
        x: (n, d) features, float64.
        y: (n,) classes.
        variance: of the prior of each of the K d weights.
        num_classes: K; the prior decides on a class without a text.
    """
    mean = logistic_weights(x, y, variance, num_classes)
    p = (x @ mean.T).softmax(1)
    trace = 1 - p.square().sum(1)
    over_classes, left = torch.linalg.eigh((torch.diag(p.sum(0)) - p.T @ p) / trace.sum())
    over_features, right = torch.linalg.eigh((x * trace.unsqueeze(1)).T @ x)
    curvature = torch.outer(over_classes.clamp(min=0), over_features.clamp(min=0))
    return LinearPosterior(mean, curvature, left, right, 1 / variance)


def ridge_posterior(x: Tensor, y: Tensor, variance: float) -> LinearPosterior:
    """Linear regression: its posterior, exact given the noise.

    The variance of the noise is the residuals' sum of squares over n minus the effective number of
    weights.

    Args:
        x: (n, d) features, float64.
        y: (n,) targets.
        variance: of the prior of a weight, in units of the noise's variance.
    """
    model = Ridge(alpha=1 / variance, fit_intercept=False)
    mean = torch.from_numpy(model.fit(x.numpy(), y.numpy()).coef_)
    values, right = torch.linalg.eigh(x.T @ x)
    values = values.clamp(min=0)
    effective = float((values / (values + 1 / variance)).sum())
    noise = float((y - x @ mean).square().sum()) / max(len(x) - effective, 1.0)
    one = torch.ones(1, 1, dtype=x.dtype)
    return LinearPosterior(
        mean.unsqueeze(0), values.unsqueeze(0) / noise, one, right, 1 / (variance * noise), noise
    )


def cross_validated(
    fit: Fit, x: Tensor, y: Tensor, num_folds: int, tolerance: float, seed: int
) -> LinearPosterior:
    """A posterior on all texts, with the prior's variance from cross-validation.

    The variance is that of the least loss of the folds that are left out, predicted with the mean
    weights. Draws of the posterior would often lose far more than they tell: hundreds of directions
    have hardly any data. So the covariance belongs to the widest prior, of those at least as sharp,
    whose draws lose no more than the tolerance.

    Args:
        fit: makes a posterior.
        x: (n, d) features, float64.
        y: (n,) labels.
        num_folds: at least 2.
        tolerance: bound on (loss of draws - loss of the mean) / |loss of the mean|, > 0.
        seed: of the folds and the draws.

    Raises:
        BaraError: there are fewer texts than folds.
    """
    if len(x) < num_folds:
        raise BaraError(
            f"method probe: {len(x)} texts cannot be shared out among {num_folds} folds; give more "
            "texts, or method_options.prior_variance"
        )
    folds = list(KFold(num_folds, shuffle=True, random_state=seed).split(x.numpy()))

    def loss(posteriors: Sequence[LinearPosterior], num_draws: int = 0) -> float:
        parts = zip(posteriors, folds, strict=True)
        losses = [p.loss(x[out], y[out], num_draws, seed) * len(out) for p, (_, out) in parts]
        return sum(losses) / len(x)

    fitted: dict[float, list[LinearPosterior]] = {}

    def loss_of(variance: float) -> float:
        fitted[variance] = [fit(x[inside], y[inside], variance) for inside, _ in folds]
        return loss(fitted[variance])

    best, least = best_variance(VARIANCES, loss_of)
    bound = least + tolerance * abs(least)
    sharpening = next(
        (f for f in SHARPENING if loss([p.sharper(f) for p in fitted[best]], NUM_DRAWS) <= bound),
        SHARPENING[-1],
    )
    return fit(x, y, best).sharper(sharpening)
