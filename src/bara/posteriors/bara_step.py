"""What BaRA does between A and B in a fused step, with its derivative (design 2.1).

    y = m * g * (u + e sqrt(s)),    g = clip(LOW + (HIGH - LOW) sigmoid(n W + c), 0, 1)

with u = A x, s = A^2 x^2, n = u / |u| (of the input's mean for gates of sequences), and what no
input changes made once for all layers: m = z (1 + sqrt(alpha) eps), c the gates' offsets with their
noise, e the noise on A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardtanh

from bara.posteriors.distributions import HIGH, LOW
from bara.posteriors.rank_functions import Gradients, Saved, divided, pooled, product, unit


@dataclass(frozen=True)
class BaraStep:
    """BaRA's rank function.

    Attributes:
        gate: with gates that depend on the input; its tensors are m, c and W, in this order, else
            m alone. Before them the constants m (HIGH - LOW) and e.
        noise: with noise on A.
        pool: the gates are those of a sequence.
    """

    gate: bool
    noise: bool
    pool: bool

    @property
    def part(self) -> str | None:
        """The gates' logits with their noise, over the temperature."""
        return "shifted" if self.gate else None

    def forward(
        self, u: Tensor, s: Tensor | None, weights: Tensor | None, tensors: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Saved]:
        m_range, e, m, *gate = tensors
        root = None if s is None else s.sqrt()
        v = u if root is None else torch.addcmul(u, root, e)
        if not self.gate:
            return product(v, m, u.dtype), None, (v, m, m_range, e, root)
        offset, weight = gate
        features = pooled(u, weights) if self.pool else u
        n, norm = unit(features)
        shifted = (n.flatten(1, 2) @ weight).view(n.shape).add_(offset)
        concrete = torch.sigmoid(shifted)
        g = hardtanh(torch.rsub(concrete, LOW, alpha=LOW - HIGH), 0.0, 1.0)
        gm = g * m
        saved = (v, gm, m_range, e, root, g, concrete, n, norm, weight, weights)
        return product(v, gm, u.dtype), shifted, saved

    def backward(
        self, saved: Saved, dy: Tensor, dpart: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Gradients]:
        v, gm, m_range, e, root, *of_gate = saved
        dv = dy * gm
        ds = (
            None if root is None else divided(dv * e, root, root.dtype)
        )  # of x^2's and A^2's halves
        h = dy * v
        if not self.gate:
            return dv.to(dy.dtype), ds, (None, None, h.sum(-2, keepdim=True))
        g, concrete, n, norm, weight, weights = of_gate
        by_position = g.shape[-2] == h.shape[-2]
        if not by_position:
            h = h.sum(-2, keepdim=True)
        dm = (h * g).sum(-2, keepdim=True)
        dshifted = torch.ops.aten.hardtanh_backward(h * m_range, g, 0.0, 1.0)
        dshifted = torch.ops.aten.sigmoid_backward(dshifted, concrete)
        if dpart is not None:
            dshifted = dshifted.add_(dpart)
        doffset = dshifted.sum(-2, keepdim=True)
        flat = dshifted.flatten(1, 2)
        dweight = n.flatten(1, 2).mT @ flat
        dn = (flat @ weight.mT).view(n.shape)
        across = torch.addcmul(dn, n, (dn * n).sum(-1, keepdim=True), value=-1)
        du = torch.empty_like(dy)
        if by_position:
            torch.addcdiv(dv, across, norm, out=du)
        elif weights is None:
            torch.add(dv, across / norm, alpha=1 / dy.shape[-2], out=du)
        else:
            torch.addcmul(dv, weights.unsqueeze(-1), across / norm, out=du)
        return du, ds, (None, None, dm, doffset, dweight)
