"""The distributions of rank space: hard-concrete gates, scale noise, and their KL divergences.

Everything is elementwise, differentiable and free of state. All KL divergences are in nats and are
meant to be evaluated in float32: the variance of a small number underflows in half precision.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GATE_TEMPERATURE = 0.66
"""Temperature of the hard-concrete gate (Louizos et al. 2018, arXiv 1712.01312)."""
LOW, HIGH = -0.1, 1.1
"""The interval to which the concrete variable is stretched before it is clipped to [0, 1]."""
OPEN_SHIFT = -GATE_TEMPERATURE * math.log(-LOW / HIGH)
"""By how much the log-odds that a gate is open exceed its logit."""


def logistic_noise(uniform: Tensor) -> Tensor:
    """Turns uniform draws in (0, 1) into draws of the standard logistic distribution."""
    tiny = torch.finfo(uniform.dtype).eps
    return torch.logit(uniform, eps=tiny)


def hard_concrete(logit: Tensor, logistic: Tensor, scale: float = 1.0) -> Tensor:
    """A draw in [0, 1], with exact zeros and ones, of the hard-concrete distribution.

    Args:
        logit: location of the gate over `scale`, any shape.
        logistic: standard logistic noise, broadcastable to `logit`.
        scale: of the location.

    Source: Louizos et al. 2018, equations 10 and 11.
    """
    # one operation each: many layers do this on few numbers (clamp's gradient takes 5 times it)
    shifted = torch.add(logistic / GATE_TEMPERATURE, logit, alpha=scale / GATE_TEMPERATURE)
    concrete = torch.sigmoid(shifted)
    return F.hardtanh(torch.rsub(concrete, LOW, alpha=LOW - HIGH), 0.0, 1.0)


def open_logit(logit: Tensor) -> Tensor:
    """Log-odds of P(gate > 0) (Louizos et al. 2018, equation 12)."""
    return logit + OPEN_SHIFT


@cache
def _quadrature(nodes: int = 16) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Points and weights for the mean of a gate: E[gate] is the integral of P(gate > v) over v.

    The points come as the shift that P(gate > v) = sigmoid(logit - shift) has at each v.
    """
    points, weights = np.polynomial.legendre.leggauss(nodes)
    v = (points + 1) / 2
    shift = GATE_TEMPERATURE * np.log((v - LOW) / (HIGH - v))
    return tuple(shift.tolist()), tuple((weights / 2).tolist())


def hard_concrete_mean(logit: Tensor) -> Tensor:
    """The mean of the hard-concrete gate, elementwise, by Gauss-Legendre quadrature (error below
    1e-6)."""
    shift, weight = _quadrature()
    shifts = torch.tensor(shift, dtype=logit.dtype, device=logit.device)
    weights = torch.tensor(weight, dtype=logit.dtype, device=logit.device)
    return torch.sigmoid(logit.unsqueeze(-1) - shifts) @ weights


def bernoulli_kl(probability: Tensor, logit: Tensor, prior: float) -> Tensor:
    """KL(Bernoulli(probability) || Bernoulli(prior)), elementwise, stable for large logits.

    Args:
        probability: sigmoid(logit), whose gradient the result has.
        logit: the log-odds.
        prior: a probability.
    """
    # p log(p/pi) + (1-p) log((1-p)/(1-pi)), regrouped so that no log of a rounded 0 occurs; what
    # is fixed has gradients p and -p, which cancel
    fixed = logit.detach()
    weighted = torch.addcmul(-F.softplus(fixed), probability, fixed - math.log(prior / (1 - prior)))
    return weighted - math.log1p(-prior)


def scale_noise_kl(alpha: Tensor, c: float) -> Tensor:
    """KL(N(theta, alpha theta^2) || N(0, c theta^2)), which does not depend on theta.

    Elementwise 0.5 * [(alpha + 1) / c - 1 - log(alpha / c)] (design 2.2).
    """
    constant = 0.5 * (1 / c - 1 + math.log(c))
    return torch.sub(0.5 / c * alpha, torch.log(alpha), alpha=0.5) + constant


def gaussian_kl(mean: Tensor, std: Tensor, prior_std: float) -> Tensor:
    """KL(N(mean, std^2) || N(0, prior_std^2)), elementwise, in closed form."""
    ratio = (std / prior_std).square()
    return 0.5 * (ratio + (mean / prior_std).square() - 1 - torch.log(ratio))


def log_uniform_kl(log_alpha: Tensor) -> Tensor:
    """KL(N(theta, alpha theta^2) || the log-uniform prior), elementwise, up to a constant.

    The approximation of Molchanov et al. 2017 (arXiv 1701.05369), equation 14, shifted so that it
    falls to 0 as alpha grows.
    """
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return k1 * torch.sigmoid(-(k2 + k3 * log_alpha)) + 0.5 * F.softplus(-log_alpha)
