"""Likelihoods of targets."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bara.errors import BaraError

MIN_LOG_VARIANCE = -10.0
"""Noise of 0.7% of the targets' standard deviation, the least that `gaussian_nll` tells apart."""


def gaussian_nll(outputs: Any, labels: Tensor) -> Tensor:
    """Negative log-likelihood of a Gaussian whose mean and variance both depend on the input.

    D. A. Nix and A. S. Weigend, "Estimating the mean and variance of the target probability
    distribution", ICNN 1994, doi:10.1109/ICNN.1994.374138.

    Args:
        outputs: a model's outputs with `logits` (B, 2): mean and log-variance. Work in units in
            which the targets have a standard deviation near 1.
        labels: (B,) or (B, 1) targets.

    Returns:
        A scalar in nats: the mean over the batch of
        (log(2 pi) + log_var + (y - mean)^2 / exp(log_var)) / 2. The log-variance counts as -10 at
        least: the likelihood of a target that is fitted exactly grows without bound as its
        variance shrinks, and so do the gradients of its neighbours. A large variance is safe.

    Raises:
        BaraError: the logits are not two per label.
    """
    logits = outputs["logits"].float()
    if logits.shape != (labels.numel(), 2):
        raise BaraError(
            f"gaussian_nll needs two outputs per label (mean and log-variance), got logits of the "
            f"shape {tuple(logits.shape)} for {labels.numel()} labels: set num_labels=2."
        )
    mean, log_variance = logits[:, 0], logits[:, 1].clamp(min=MIN_LOG_VARIANCE)
    squared_error = (labels.flatten().to(mean) - mean).square()
    nll = math.log(2 * math.pi) + log_variance + squared_error * torch.exp(-log_variance)
    return 0.5 * nll.mean()


def require_finite(logits: Tensor) -> Tensor:
    """The logits, of any shape.

    Raises:
        BaraError: one of them is not finite.
    """
    if not torch.isfinite(logits).all():
        raise BaraError(
            "The model's logits are not finite: the adapter was damaged or training diverged."
        )
    return logits
