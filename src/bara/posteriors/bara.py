"""BaRA: sparse, input-dependent factors (arXiv 2606.29184; the details are design 2.1).

    m_k(x) = z_k * g_k(x) * theta_k(x) * (1 + sqrt(alpha_k) * eps_k)

with the task's gates z, the input's gates g, optional intensities theta and the factors' noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bara.configs import BaraConfig
from bara.distributions import (
    bernoulli_kl,
    beta_bernoulli_kl,
    hard_concrete,
    hard_concrete_mean,
    logistic_noise,
    open_logit,
    scale_noise_kl,
    weibull_gamma_kl,
    weibull_mean,
    weibull_sample,
)
from bara.draws import Noise
from bara.posteriors.base import (
    Granularity,
    Posterior,
    PosteriorOutput,
    RankSpace,
    rms_normalised,
    wide,
)


class BaraPosterior(Posterior):
    """The gates, intensities, noise and priors of one layer's r factors."""

    def __init__(self, config: BaraConfig, rank: int, granularity: Granularity) -> None:
        super().__init__(rank, granularity)
        self.config = config
        start = config.init_logit / config.logit_scale
        if config.global_gate:
            self.global_logit = nn.Parameter(torch.full((rank,), start))
        if config.local_gate:
            self.gate_weight = nn.Parameter(torch.randn(rank, rank) * 0.01)
            self.gate_bias = nn.Parameter(torch.full((rank,), start))
        if config.intensity:
            self.intensity_weight = nn.Parameter(torch.zeros(rank, rank))
            self.intensity_bias = nn.Parameter(torch.zeros(rank))
            self.intensity_log_shape = nn.Parameter(torch.full((rank,), math.log(4.0)))
        if config.factor_noise:
            # a logarithm, so that Adam changes alpha by a factor; scaled as the gates' logits are
            log_alpha = math.log(config.init_noise) / config.logit_scale
            self.noise_logit = nn.Parameter(torch.full((rank,), log_alpha))

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        with torch.autocast(space.u.device.type, enabled=False):
            features = self.features(space)
            multipliers = self._task_multipliers(noise) + self._input_multipliers(features, noise)
            u = space.u
            if multipliers:
                u = u * reduce(torch.mul, multipliers).to(u.dtype)
            if not with_kl:
                return PosteriorOutput(u, None, None, None)
            self.calibrated = None  # the gates are about to change
            return PosteriorOutput(u, *self._kl(space, features))

    @property
    def depends_on_input(self) -> bool:
        return self.config.local_gate or self.config.intensity

    def features(self, space: RankSpace) -> Tensor | None:
        """What the input-dependent parts read, (B, 1 or T, r); None if there are none."""
        if not self.depends_on_input:
            return None
        return rms_normalised(space.pooled(self.granularity))

    def _gate(self, name: str, logit: Tensor, noise: Noise | None) -> Tensor:
        """A draw of the gates, or their mean; one number per input is shared by its tokens."""
        if noise is None:
            return hard_concrete_mean(logit)
        uniform = noise.uniform(name, (self.rank,)).unsqueeze(1)
        return hard_concrete(logit, logistic_noise(uniform))

    def _task_multipliers(self, noise: Noise | None) -> list[Tensor]:
        """z and 1 + sqrt(alpha) eps, each broadcastable to (B, T, r)."""
        multipliers = []
        if self.config.global_gate:
            multipliers.append(self._gate("z", self.global_gate_logit(), noise))
        if self.config.factor_noise and noise is not None:
            eps = noise.normal("eps", (self.rank,)).unsqueeze(1)
            multipliers.append(1 + self.noise_variance().sqrt() * eps)
        return multipliers

    def _input_multipliers(self, features: Tensor | None, noise: Noise | None) -> list[Tensor]:
        """g(x) and theta(x), each (B, 1 or T, r)."""
        multipliers = []
        if self.config.local_gate:
            assert features is not None
            multipliers.append(self._gate("g", self.local_gate_logit(features), noise))
        if self.config.intensity:
            assert features is not None
            shape, scale = self.intensity(features)
            if noise is None:
                multipliers.append(weibull_mean(shape, scale))
            else:
                uniform = noise.uniform("theta", (self.rank,)).unsqueeze(1)
                multipliers.append(weibull_sample(shape, scale, uniform))
        return multipliers

    def global_gate_logit(self) -> Tensor:
        """Location of the task's gates, (r,)."""
        return self.config.logit_scale * wide(self.global_logit)

    def inclusion(self) -> Tensor:
        """P(z_k > 0), (r,); ones without a global gate."""
        if not self.config.global_gate:
            return torch.ones(self.rank, device=next(self.parameters()).device)
        return torch.sigmoid(open_logit(self.global_gate_logit()))

    def noise_variance(self) -> Tensor:
        """alpha, the factors' variance relative to their squared mean, (r,)."""
        return torch.exp(self.config.logit_scale * wide(self.noise_logit))

    def local_gate_logit(self, features: Tensor) -> Tensor:
        """Location of the input's gates, (B, 1 or T, r), from normalised features.

        Divided by sqrt(r): the r weights of a gate move together under Adam, and without it they
        close a gate for all inputs at once long before its factor has learned anything.
        """
        return self.config.logit_scale * self.linear_outputs(features)["gate"]

    def intensity(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Shape (r,) and scale (B, 1 or T, r) of the Weibull posterior; its mean starts at 1."""
        shape = wide(self.intensity_log_shape).exp()
        log_mean = self.linear_outputs(features)["intensity"]
        return shape, torch.exp(log_mean - torch.lgamma(1 + 1 / shape))

    def linear_outputs(self, features: Tensor) -> dict[str, Tensor]:
        """What the linear maps of the input-dependent parts give, (B, 1 or T, r), by their name."""
        outputs = {}
        if self.config.local_gate:
            weight = wide(self.gate_weight) / math.sqrt(self.rank)
            outputs["gate"] = linear(features, weight, wide(self.gate_bias))
        if self.config.intensity:
            weight, bias = wide(self.intensity_weight), wide(self.intensity_bias)
            outputs["intensity"] = linear(features, weight, bias)
        return outputs

    def keep_factors(self, kept: Tensor, maps: Mapping[str, Tensor]) -> None:
        """Drops all factors but r' of them.

        Args:
            kept: their numbers, (r',).
            maps: by the names of `linear_outputs`, the new weights and (last column) biases of the
                maps from the normalised features of the r' factors to the outputs, (r', r' + 1).
        """
        self.rank = len(kept)
        self.calibrated = None
        values = {name: parameter[kept] for name, parameter in self.named_parameters()}
        for name, solution in maps.items():
            scale = math.sqrt(self.rank) if name == "gate" else 1.0
            values[f"{name}_weight"] = solution[:, :-1] * scale
            values[f"{name}_bias"] = solution[:, -1]
        for name, old in list(self.named_parameters()):
            value = values[name].detach().to(old).clone()
            setattr(self, name, nn.Parameter(value, requires_grad=old.requires_grad))

    def _kl(
        self, space: RankSpace, features: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """KL_global, KL_local (B,) and the activity (B, r) or (r,) of design 2.1.

        What belongs to a factor is paid for in proportion to P(z_k > 0): an inactive factor has
        gone back to its prior.
        """
        config = self.config
        active = torch.ones(self.rank, device=space.u.device)
        kl_global: list[Tensor] = []
        if config.global_gate:
            opened = open_logit(self.global_gate_logit())
            active = torch.sigmoid(opened)
            if config.global_prior_beta is None:
                kl_global.append(bernoulli_kl(opened, config.global_prior).sum())
            else:
                kl_global.append(beta_bernoulli_kl(opened, *config.global_prior_beta))
        if config.factor_noise:
            kl = scale_noise_kl(self.noise_variance(), config.noise_prior)
            kl_global.append((kl * active).sum())
        if config.prior_std is not None:
            kl_global.append((space.squared_columns() * active).sum() / (2 * config.prior_std**2))

        kl_local: list[Tensor] = []
        activity = active
        local_open: Tensor | None = None
        if config.local_gate:
            assert features is not None
            opened = open_logit(self.local_gate_logit(features))
            local_open = torch.sigmoid(opened)
            kl_local.append(bernoulli_kl(opened, config.local_prior))
            activity = active * space.mean_over_positions(local_open)
        if config.intensity:
            assert features is not None
            a = config.intensity_prior  # Gamma(a, rate a) has mean 1
            kl = weibull_gamma_kl(*self.intensity(features), a, a)
            kl_local.append(kl if local_open is None else kl * local_open)
        return (
            sum(kl_global[1:], kl_global[0]) if kl_global else None,
            space.mean_over_positions(sum(kl_local[1:], kl_local[0]) @ active)
            if kl_local
            else None,
            activity,
        )

    def open_probability(self, space: RankSpace) -> Tensor:
        with torch.autocast(space.u.device.type, enabled=False):
            probability = super().open_probability(space)
            if self.config.global_gate:
                probability = probability * self.inclusion()
            features = self.features(space)
            if self.config.local_gate and features is not None:
                logit = self.local_gate_logit(features)
                probability = probability * torch.sigmoid(open_logit(logit))
            return probability

    def open_draw(self, space: RankSpace, noise: Noise) -> Tensor:
        with torch.autocast(space.u.device.type, enabled=False):
            opened = super().open_draw(space, noise)
            if self.config.global_gate:
                opened = opened & (self._gate("z", self.global_gate_logit(), noise) > 0)
            features = self.features(space)
            if self.config.local_gate and features is not None:
                logit = self.local_gate_logit(features)
                opened = opened & (self._gate("g", logit, noise) > 0)
            return opened

    def input_dependence(self, space: RankSpace) -> Tensor | None:
        features = self.features(space)
        if features is None:
            return None
        multiplier = reduce(torch.mul, self._input_multipliers(features, None))
        return space.mean_over_positions(multiplier).mean(dim=0)

    def mean_scale(self) -> Tensor | None:
        scale = torch.ones(self.rank, device=next(self.parameters()).device)
        if self.config.global_gate:
            scale = scale * hard_concrete_mean(self.global_gate_logit())
        if self.depends_on_input:
            scale = scale * self._calibrated().to(scale)
        return scale

    def lora_draw(self, a: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        scale = torch.ones(self.rank, device=next(self.parameters()).device)
        for multiplier in self._task_multipliers(noise):
            scale = scale * multiplier.flatten()
        if self.depends_on_input:
            scale = scale * self._calibrated().to(scale)
        return a, scale
