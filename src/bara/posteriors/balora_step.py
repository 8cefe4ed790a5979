"""What BaLoRA does between A and B in a fused step, with its derivative (design 2.2).

    y = u + e sqrt(s alpha(u)),    alpha = softplus(w tanh(W n + b) + c)

with u = A x, s = A^2 x^2, n = u / |u| (of the input's mean for the noise of sequences), through
which no gradient goes, and e the noise on A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bara.posteriors.rank_functions import Gradients, Saved, pooled, product, unit

LEAST_ALPHA = 1e-6
"""Least relative variance, so that its logarithm is finite."""


@dataclass(frozen=True)
class BaloraStep:
    """BaLoRA's rank function.

    Attributes:
        pool: alpha is that of a sequence.
    """

    pool: bool
    part = "alpha"

    def forward(
        self, u: Tensor, s: Tensor | None, weights: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Saved]:
        assert s is not None
        e, hidden_weight, hidden_bias, output_weight, output_bias = tensors
        features, _ = unit(pooled(u, weights) if self.pool else u)
        flat = features.flatten(1, 2)
        hidden = torch.tanh(torch.baddbmm(hidden_bias.unsqueeze(1), flat, hidden_weight.mT))
        raw = torch.baddbmm(output_bias.unsqueeze(1), hidden, output_weight.mT)
        alpha = (softplus(raw) + LEAST_ALPHA).view(*features.shape[:-1], 1)
        level = (s * alpha).sqrt()
        y = torch.addcmul(u, level, e, out=torch.empty_like(u))
        return y, alpha, (s, e, alpha, level, raw, hidden, flat, output_weight)

    def backward(
        self, saved: Saved, dy: Tensor, dpart: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        s, e, alpha, level, raw, hidden, flat, output_weight = saved
        of_variance = dy * e / level  # twice the gradient of s alpha
        ds = product(of_variance, alpha, s.dtype)  # twice, for x^2 and A^2 pass on half of theirs
        dalpha = (of_variance * s).sum(-1, keepdim=True)
        if alpha.shape[-2] != dy.shape[-2]:
            dalpha = dalpha.sum(-2, keepdim=True)
        dalpha = dalpha / 2 if dpart is None else torch.add(dpart, dalpha, alpha=0.5)
        draw = torch.ops.aten.softplus_backward(dalpha.view(raw.shape), raw, 1, 20)
        dhidden = torch.ops.aten.tanh_backward(draw @ output_weight, hidden)
        gradients = dhidden.mT @ flat, dhidden.sum(1), draw.mT @ hidden, draw.sum(1)
        return dy, ds, (None, *gradients)
