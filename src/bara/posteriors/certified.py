"""An adapter without point estimates: Bernoulli gates and a Gaussian B (docs/certificates.md).

    y = W0 x + s B (z * A x),    z_k ~ Bernoulli(p_k),    b_k | z_k = 1 ~ N(mu_k, sigma_k^2 I)

A is fixed at its random start. Given z_k = 0 the column b_k has its prior, and no effect.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from bara.draws.draws import Noise
from bara.errors import BaraError
from bara.posteriors.config import CertifiedConfig
from bara.posteriors.distributions import TEMPERATURE, logistic_noise
from bara.posteriors.posterior import Posterior, PosteriorOutput
from bara.posteriors.rank_space import Granularity, RankSpace, wide


class CertifiedPosterior(Posterior):
    """The gates and standard deviations of one layer's factors, and the prior of all of it.

    Posterior and prior are the same where the parameters are 0 and B is at `prior_mean`. The mean
    mu of B is the weight of the layer's `lora_B`.
    """

    prior_mean: Tensor
    prior_logit: Tensor
    prior_log_std: Tensor

    def __init__(self, config: CertifiedConfig, rank: int, granularity: Granularity) -> None:
        super().__init__(rank, granularity)
        self.config = config
        self.gate = nn.Parameter(torch.zeros(rank))
        self.spread = nn.Parameter(torch.zeros(rank))
        odds = math.log(config.global_prior / (1 - config.global_prior))
        self.register_buffer("prior_logit", torch.full((rank,), odds))
        self.register_buffer("prior_log_std", torch.full((rank,), math.log(config.prior_std)))

    def start(self, a: Tensor, b: Tensor) -> None:
        if b.dim() != 2:
            raise BaraError("CertifiedConfig adapts linear layers only; target others no more.")
        self.register_buffer("prior_mean", torch.zeros_like(b))

    def logit(self) -> Tensor:
        """Log-odds of the gates, (r,)."""
        return wide(self.prior_logit) + self.config.logit_scale * wide(self.gate)

    def log_std(self) -> Tensor:
        """log sigma of B's columns, (r,)."""
        return wide(self.prior_log_std) + self.config.logit_scale * wide(self.spread)

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        with torch.autocast(space.u.device.type, enabled=False):
            if noise is None:
                gated, from_b = space.wide_u * self.logit().sigmoid(), None
            else:
                gated = space.wide_u * self._draw_gates(noise).unsqueeze(1)
                normal = noise.normal("B", tuple(space.b.shape))
                from_b = torch.einsum("btr,bor->bto", gated, normal * self.log_std().exp())
            kl = {}
            if with_kl:
                kl = {"parameters": self.kl_of(space.b), "activity": self.logit().sigmoid()}
            return PosteriorOutput(gated.to(space.u.dtype), kl, from_b)

    def _draw_gates(self, noise: Noise) -> Tensor:
        """Bernoulli draws, (B, r), with the gradient of a concrete relaxation (straight-through).

        Source: Jang et al. 2017 (arXiv 1611.01144). Training draws what the certificate draws.
        """
        shifted = self.logit() + logistic_noise(noise.uniform("z", (self.rank,)))
        soft = torch.sigmoid(shifted / TEMPERATURE)
        return (shifted > 0).to(soft) + (soft - soft.detach())  # the difference is exactly 0

    def kl_of(self, b: Tensor) -> Tensor:
        """KL(posterior || prior) of this layer, a scalar in nats.

        KL(Bern(p) || Bern(pi)) + p KL(N(mu, sigma^2) || N(mu_0, sigma_0^2)), summed over factors:
        a column whose gate is closed has its prior.

        Args:
            b: mu, the weight of B, (d_out, r).
        """
        gates = kl_divergence(Bernoulli(logits=self.logit()), Bernoulli(logits=self.prior_logit))
        posterior = Normal(wide(b), self.log_std().exp())
        prior = Normal(wide(self.prior_mean), wide(self.prior_log_std).exp())
        columns = kl_divergence(posterior, prior).sum(0)
        return (gates + self.logit().sigmoid() * columns).sum()

    @torch.no_grad()
    def take_as_prior(self, b: Tensor) -> None:
        """Makes the posterior with B's mean b, (d_out, r), the prior."""
        self.prior_mean.copy_(b)
        self.prior_logit.copy_(self.logit())
        self.prior_log_std.copy_(self.log_std())
        self.gate.zero_()
        self.spread.zero_()

    def open_probability(self, space: RankSpace) -> Tensor:
        return super().open_probability(space) * self.logit().sigmoid()

    def mean_scale(self) -> Tensor | None:
        raise BaraError(
            "A certified adapter is not merged: its certificate is for draws of the posterior, "
            "not for their mean."
        )
