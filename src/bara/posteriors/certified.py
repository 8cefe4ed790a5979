"""An adapter without point estimates: Bernoulli gates and a Gaussian B (docs/certificates.md).

    y = W0 x + s B (z * A x),    z_k ~ Bernoulli(p_k),    b_k | z_k = 1 ~ N(mu_k, sigma_k^2 I)

A is fixed at its random start. Given z_k = 0 the column b_k has its prior, and no effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.nn.functional import linear

from bara.draws.draws import Noise
from bara.errors import BaraError
from bara.posteriors.config import About, BayesianConfig
from bara.posteriors.distributions import GATE_TEMPERATURE, logistic_noise
from bara.posteriors.posterior import LOG_SCALE, LayerSetup, Posterior, PosteriorOutput
from bara.posteriors.rank_space import RankSpace, wide
from bara.posteriors.registry import register

PRIOR_STDS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""The grid of prior standard deviations that a certificate's union bound pays for."""


@dataclass
class CertifiedConfig(BayesianConfig):
    """An adapter whose every fitted number has a posterior, for a certificate (`bara.certify`).

    A stays at its random start. Each factor has a Bernoulli gate and a Gaussian column of B, one
    standard deviation a factor; the heads are Gaussian element by element. There are no local
    gates. See docs/certificates.md.

    `task_type` is set to None and `modules_to_save` is moved to `heads`: PEFT would train a head
    that has no posterior.
    """

    FROZEN: ClassVar[tuple[str, ...]] = ("lora_A",)
    RETIRED: ClassVar[dict[str, Any]] = {"logit_scale": 10.0}
    UNUSED = ("local_kl_weight", "granularity")

    heads: list[str] = field(
        default_factory=lambda: ["classifier", "score"],
        metadata={"help": "Names of the modules to be trained as a whole; linear layers only."},
    )
    global_prior: float = field(
        default=0.9,
        metadata={"help": "Prior probability, in (0, 1), that a factor is used; also the start."},
    )
    prior_std: float = field(
        default=0.1,
        metadata={
            "help": f"Standard deviation of B's prior N(0, std^2), and the start; of {PRIOR_STDS}."
        },
    )
    head_prior_std: float = field(
        default=0.1,
        metadata={
            "help": "Standard deviation of the heads' prior, whose mean is their random start; of "
            f"{PRIOR_STDS}."
        },
    )
    prior_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Part of the data, in [0, 1), on which `bara train` first learns the prior. "
            "The certificate is then computed on the rest."
        },
    )
    data_digest: str | None = field(
        default=None,
        metadata={"help": "SHA-256 of the data to certify on; filled in by `bara train`."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.task_type = None
        self.heads = [*self.heads, *(n for n in self.modules_to_save or () if n not in self.heads)]
        self.modules_to_save = None
        self._require_real("global_prior", low=0, high=1, strict=True)
        for name in ("prior_std", "head_prior_std"):
            value = getattr(self, name)
            self._require(name, value, value in PRIOR_STDS, f"one of {PRIOR_STDS}")
        fraction = self.prior_fraction
        self._require("prior_fraction", fraction, 0 <= fraction < 1, "a number in [0, 1)")
        for name, needed in (("bias", "none"), ("lora_bias", False)):
            value = getattr(self, name)
            self._require(name, value, value == needed, f"{needed!r}: it has no posterior")
        tokens = self.trainable_token_indices
        self._require("trainable_token_indices", tokens, tokens is None, "None: no posterior")


class CertifiedPosterior(Posterior):
    """The gates and standard deviations of one layer's factors, and the prior of all of it.

    Posterior and prior are the same where the parameters are 0 and B is at `prior_mean`. The mean
    mu of B is the weight of the layer's `lora_B`.
    """

    config: CertifiedConfig

    prior_mean: Tensor
    prior_logit: Tensor
    prior_log_std: Tensor

    def __init__(self, setup: LayerSetup[CertifiedConfig]) -> None:
        super().__init__(setup)
        config, rank = setup.config, self.rank
        self.gate = nn.Parameter(torch.zeros(rank))
        self.spread = nn.Parameter(torch.zeros(rank))
        odds = math.log(config.global_prior / (1 - config.global_prior))
        self.register_buffer("prior_logit", torch.full((rank,), odds))
        self.register_buffer("prior_log_std", torch.full((rank,), math.log(config.prior_std)))
        if setup.b.dim() != 2:
            raise BaraError("CertifiedConfig adapts linear layers only; target others no more.")
        self.register_buffer("prior_mean", torch.zeros_like(setup.b))

    def logit(self) -> Tensor:
        """Log-odds of the gates, (r,)."""
        return wide(self.prior_logit) + LOG_SCALE * wide(self.gate)

    def log_std(self) -> Tensor:
        """log sigma of B's columns, (r,)."""
        return wide(self.prior_log_std) + LOG_SCALE * wide(self.spread)

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
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
        soft = torch.sigmoid(shifted / GATE_TEMPERATURE)
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


class GaussianLinear(nn.Module):
    """A linear layer whose weight and bias are N(mean, std^2), element by element.

    The prior's mean is the layer's start, so that a saved head is complete.
    """

    def __init__(self, layer: nn.Linear, config: CertifiedConfig) -> None:
        super().__init__()
        self.names = [name for name, _ in layer.named_parameters()]  # weight, and perhaps bias
        for name, value in layer.named_parameters():
            mean = wide(value.detach()).clone()
            log_std = torch.full_like(mean, math.log(config.head_prior_std))
            self.register_parameter(f"mean_{name}", nn.Parameter(mean))
            self.register_parameter(f"spread_{name}", nn.Parameter(torch.zeros_like(mean)))
            self.register_buffer(f"prior_mean_{name}", mean.clone())
            self.register_buffer(f"prior_log_std_{name}", log_std)

    def _part(self, kind: str, name: str) -> Tensor:
        return getattr(self, f"{kind}_{name}")

    def _mean(self, name: str) -> Tensor:
        return wide(self._part("mean", name))

    def _log_std(self, name: str) -> Tensor:
        return wide(self._part("prior_log_std", name)) + LOG_SCALE * wide(
            self._part("spread", name)
        )

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        """Applies a draw to each row of x, (B, ..., d_in), or the mean if `noise` is None."""
        with torch.autocast(x.device.type, enabled=False):
            means = {name: self._mean(name) for name in self.names}
            x = x.to(means["weight"].dtype)
            output = linear(x, means["weight"], means.get("bias"))
            if noise is None:
                return output
            draw = {
                name: noise.normal(name, tuple(mean.shape)) * self._log_std(name).exp()
                for name, mean in means.items()
            }
            rows = x.reshape(x.shape[0], -1, x.shape[-1])
            change = torch.einsum("bti,boi->bto", rows, draw["weight"])
            if "bias" in draw:
                change = change + draw["bias"].unsqueeze(1)
            return output + change.reshape(output.shape)

    def kl(self) -> Tensor:
        """KL(posterior || prior), a scalar in nats."""
        terms = []
        for name in self.names:
            posterior = Normal(self._mean(name), self._log_std(name).exp())
            prior_std = wide(self._part("prior_log_std", name)).exp()
            prior = Normal(wide(self._part("prior_mean", name)), prior_std)
            terms.append(kl_divergence(posterior, prior).sum())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def take_as_prior(self) -> None:
        """Makes the posterior the prior."""
        for name in self.names:
            self._part("prior_log_std", name).copy_(self._log_std(name))
            self._part("prior_mean", name).copy_(self._mean(name))
            self._part("spread", name).zero_()


register(
    CertifiedConfig,
    CertifiedPosterior,
    About(
        name="certified",
        title="the certified mode",
        summary="an adapter whose every fitted number has a posterior, for bara certify",
        random="gates, B and the head",
        paper="docs/certificates.md",
    ),
    head=GaussianLinear,
)
