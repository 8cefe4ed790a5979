"""What the metrics of every kind of prediction are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from bara.errors import BaraError

NUM_BINS = 15
"""Of a calibration error."""


def risk_coverage(uncertainty: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss on the inputs that are left when the most uncertain ones go unanswered.

    Geifman & El-Yaniv (2017, arXiv 1705.08500). Equally uncertain inputs are answered in random
    order, and the expectation over that order is returned; so the inputs' own order never counts.

    Args:
        uncertainty: (n,), larger = answered later.
        loss: (n,), for instance 1 for a wrong answer and 0 for a right one.

    Returns:
        (n,) coverages 1/n … 1 and (n,) risks, float64. The area under the curve is the mean risk.

    Raises:
        BaraError: no inputs, or two different numbers of them.
    """
    if uncertainty.shape != loss.shape or loss.dim() != 1 or len(loss) == 0:
        raise BaraError(
            "uncertainty and loss must be one number for each input, at least one, not of the "
            f"shapes {tuple(uncertainty.shape)} and {tuple(loss.shape)}"
        )
    _, group, size = uncertainty.unique(return_inverse=True, return_counts=True)
    group_loss = torch.zeros(len(size), dtype=torch.float64).index_add_(0, group, loss.double())
    answered = torch.arange(1, len(loss) + 1, dtype=torch.float64)
    risk = (group_loss / size).repeat_interleave(size).cumsum(0) / answered
    return answered / len(loss), risk


def below_one(probs: Tensor) -> Tensor:
    """Probabilities of any shape, those of 1 just below it.

    torchmetrics gives a probability of exactly 1 a bin of its own, and takes one that rounding has
    put above 1 for a logit.
    """
    return probs.clamp(max=1 - torch.finfo(probs.dtype).eps)


def event_calibration_error(probs: Tensor, happened: Tensor) -> float:
    """Expected calibration error of the probabilities of events, 15 bins of equal width.

    Args:
        probs: (n,) probabilities.
        happened: (n,) whether each came true.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    error = binary_calibration_error(below_one(probs.float()), happened.long(), n_bins=NUM_BINS)
    return float(error)
