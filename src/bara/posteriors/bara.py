"""BaRA: sparse, input-dependent factors (arXiv 2606.29184; the details are design 2.1).

    m_k(x) = z_k * g_k(x) * (1 + sqrt(alpha_k) * eps_k),    A ~ N(theta_A, c theta_A^2)

with the task's gates z, the input's gates g, the factors' noise, and noise of a fixed relative
variance c on the elements of A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bara.draws.draws import Noise
from bara.draws.noise_stack import NoiseStack
from bara.posteriors.bara_config import BaraConfig, BaraResolved
from bara.posteriors.bara_step import BaraStep
from bara.posteriors.config import About
from bara.posteriors.distributions import (
    GATE_TEMPERATURE,
    HIGH,
    LOW,
    OPEN_SHIFT,
    bernoulli_kl,
    hard_concrete,
    hard_concrete_mean,
    logistic_noise,
    open_logit,
    scale_noise_kl,
)
from bara.posteriors.fused import Fused, Stack
from bara.posteriors.kernels.on_device import on_device
from bara.posteriors.parameters import can_set, set_parameter
from bara.posteriors.posterior import (
    Kl,
    LayerSetup,
    Posterior,
    PosteriorOutput,
    ScaledGradient,
    gaussian_draw,
)
from bara.posteriors.rank_space import RankSpace, position_mean, rms_normalised, wide
from bara.posteriors.registry import register

LOGIT_SCALE = 100.0
"""Fixed factor between a parameter and the logit of a gate (or log alpha): with 1 a gate hardly
moves at LoRA's learning rates (docs/methods.md)."""
OPEN = 3.0
"""Logit at which a gate starts: open with P = 0.99."""
MOST_OPEN = 11
"""Factors of a layer that an input starts with, at most."""


class Variables(NamedTuple):
    """What the variables are distributed by on one batch; None for those that an adapter lacks.

    Attributes:
        z: location of the task's gates over `LOGIT_SCALE`, (r,).
        log_alpha: logarithm of the factors' variance, relative to their squared mean, over
            `LOGIT_SCALE`, (r,).
        g: location of the input's gates over `LOGIT_SCALE`, (B, 1 or T, r).
    """

    z: Tensor | None
    log_alpha: Tensor | None
    g: Tensor | None = None

    def gates(self) -> dict[str, Tensor]:
        """The gates' locations over `LOGIT_SCALE`, by name."""
        return {n: g for n, g in (("z", self.z), ("g", self.g)) if g is not None}


class BaraPosterior(Posterior):
    """The gates, noise and priors of one layer's r factors."""

    config: BaraConfig

    resolved: BaraResolved

    def __init__(self, setup: LayerSetup[BaraConfig]) -> None:
        super().__init__(setup)
        config = setup.config
        rank = self.rank
        if config.global_gate:
            self.global_logit = nn.Parameter(torch.full((rank,), OPEN / LOGIT_SCALE))
        if config.local_gate:
            start = self._init_local_logit() / LOGIT_SCALE
            self.gate_weight = nn.Parameter(torch.randn(rank, rank) * (0.2 / LOGIT_SCALE))
            self.gate_bias = nn.Parameter(torch.full((rank,), start))
        if config.factor_noise:
            self._noise_start = self._init_noise_logit()
            self.noise_logit = nn.Parameter(torch.full((rank,), self._noise_start))

    @property
    def weight_noise(self) -> float:
        """The relative variance of the noise on A in force."""
        return self.resolved.strength * self.resolved.weight_noise

    def _init_noise_logit(self) -> float:
        # a logarithm, so that Adam changes alpha by a factor; scaled as the gates' logits are
        return math.log(self.resolved.init_noise) / LOGIT_SCALE

    def _init_local_logit(self) -> float:
        """Where the local gates start: the more factors there are, the fewer of them are open."""
        rank = self.rank
        if self.config.init_local_logit is not None:
            return self.config.init_local_logit
        if rank <= MOST_OPEN:
            return OPEN
        odds = MOST_OPEN / (rank - MOST_OPEN)
        return min(OPEN, math.log(odds) - OPEN_SHIFT)

    @torch.no_grad()
    def start_again(self) -> None:
        if not self.config.factor_noise or not can_set(self.noise_logit):
            return
        if bool((self.noise_logit == self._noise_start).all()):
            self._noise_start = self._init_noise_logit()
            set_parameter(self.noise_logit, self._noise_start)

    def forward(self, space: RankSpace, noise: Noise | None, with_kl: bool) -> PosteriorOutput:
        variables, u = self.variables(space), space.wide_u
        if noise is not None and (variance := self.weight_noise):
            u = space.with_relative_noise(variance, noise)
        if multipliers := self._multipliers(variables, noise):
            u = u * reduce(torch.mul, multipliers)
        u = u.to(space.u.dtype)
        if not with_kl:
            return PosteriorOutput(u)
        return PosteriorOutput(u, self._kl_parts(space, variables))

    @property
    def depends_on_input(self) -> bool:
        return self.config.local_gate

    def variables(self, space: RankSpace) -> Variables:
        """The posterior on one batch."""
        return self.task_variables()._replace(g=self.linear_outputs(space).get("gate"))

    def _location(self, parameter: Tensor) -> Tensor:
        """A parameter, over `LOGIT_SCALE`, whose step does not depend on that factor.

        The change of a logit under plain gradient descent is that of a logit which is a parameter
        itself, in place of 10,000 times it; Adam, which divides by the gradient's size, does not
        see the difference. While the KL has no weight the gates stay open: their gradient is noise
        then, of which Adam makes whole steps.
        """
        factor = 0.0 if self.resolved.held else LOGIT_SCALE**-2
        return ScaledGradient.apply(wide(parameter), factor)

    def task_variables(self, stack: Stack | None = None) -> Variables:
        """The part of the posterior that no input changes: this layer's, or a stack's, (L, r)."""

        def location(name: str, there: bool) -> Tensor | None:
            return self._location(self.parameter(name, stack)) if there else None

        return Variables(
            z=location("global_logit", self.config.global_gate),
            log_alpha=location("noise_logit", self.config.factor_noise),
        )

    def fuse(self, stack: Stack) -> Fused:
        config, noise, shape = self.config, stack.noise, (self.rank,)
        of_task = self.task_variables(stack)
        parts = {n: v for n, v in of_task._asdict().items() if v is not None}
        of_input = (None if v is None else v[:, None, None] for v in of_task)  # (L, 1, 1, r)
        multipliers = self._multipliers(Variables(*of_input), noise)
        eps = noise.normal("A", shape).unsqueeze(2)
        m = reduce(torch.mul, multipliers) if multipliers else torch.ones_like(eps)
        tensors = [m.detach() * (HIGH - LOW), self.weight_noise**0.5 * eps, m]
        if config.local_gate:
            logistic = logistic_noise(noise.uniform("g", shape)).unsqueeze(2) / GATE_TEMPERATURE
            bias = self._location(stack.parameter("gate_bias"))[:, None, None]
            weight = self._location(stack.parameter("gate_weight")).mT
            scale = LOGIT_SCALE / GATE_TEMPERATURE
            # features of norm 1 here, of root mean square 1 there
            root = math.sqrt(self.rank) * self._gate_scale()
            tensors += [torch.add(logistic, bias, alpha=scale), weight * (scale * root)]
            parts["logistic"] = logistic
        if stack.with_kl:
            parts["columns"] = stack.squared_columns()
        noisy = self.weight_noise > 0
        step = BaraStep(config.local_gate, noisy, self.granularity == "sequence")
        step = on_device(step, "bara", tensors, stack.dtype)
        return Fused(step, tensors, parts, squares=noisy)

    def linear_outputs(self, space: RankSpace) -> dict[str, Tensor]:
        """What the maps of the input-dependent parts make of normalised features, by their names.

        `gate` is the location of the input's gates over `LOGIT_SCALE`, (B, 1 or T, r).
        """
        if not self.depends_on_input:
            return {}
        features = rms_normalised(space.pooled(self.granularity))
        weight, bias = self._location(self.gate_weight), self._location(self.gate_bias)
        return {"gate": linear(features, weight * self._gate_scale(), bias)}

    def _gate_scale(self) -> float:
        """On `gate_weight`: 1 / sqrt(r), because the r weights of a gate move together under Adam,
        and would otherwise close a gate for all inputs at once long before its factor has learned
        anything."""
        return 1 / math.sqrt(self.rank)

    def _multipliers(self, variables: Variables, noise: Noise | NoiseStack | None) -> list[Tensor]:
        """z, 1 + sqrt(alpha) eps and g drawn, or without noise their means.

        Each broadcasts to (B, T, r); one random number per input is shared by its tokens.
        """
        multipliers = []
        if variables.z is not None:
            multipliers.append(self._gate("z", variables.z, noise))
        if variables.log_alpha is not None and noise is not None:
            eps = noise.normal("eps", (self.rank,)).unsqueeze(-2)
            std = torch.exp(variables.log_alpha * (LOGIT_SCALE / 2))
            multipliers.append(1 + std * eps)
        if variables.g is not None:
            multipliers.append(self._gate("g", variables.g, noise))
        return multipliers

    def _gate(self, name: str, logit: Tensor, noise: Noise | NoiseStack | None) -> Tensor:
        if noise is None:
            return hard_concrete_mean(LOGIT_SCALE * logit)
        uniform = noise.uniform(name, (self.rank,)).unsqueeze(-2)
        return hard_concrete(logit, logistic_noise(uniform), LOGIT_SCALE)

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
            values[f"{name}_weight"] = solution[:, :-1] / self._gate_scale()
            values[f"{name}_bias"] = solution[:, -1]
        for name, old in list(self.named_parameters()):
            value = values[name].detach().to(old).clone()
            setattr(self, name, nn.Parameter(value, requires_grad=old.requires_grad))

    def _kl_parts(self, space: RankSpace, variables: Variables) -> dict[str, Tensor]:
        """|b_k|^2, the variables and the weights of the positions, by name."""
        z, log_alpha, g = variables
        parts = {"columns": space.squared_columns()}
        if z is not None:
            parts["z"] = z
        if log_alpha is not None:
            parts["log_alpha"] = log_alpha
        if g is not None:
            parts["g"] = g
        if self.granularity == "token" and self.depends_on_input and space.weights is not None:
            parts["weights"] = space.weights
        return parts

    def kl(self, parts: Mapping[str, Tensor]) -> Kl:
        """KL_global, KL_local and the activity of design 2.1.

        What belongs to a factor is paid for in proportion to P(z_k > 0): an inactive factor has
        gone back to its prior.
        """
        config, columns = self.config, parts["columns"]
        active = torch.ones_like(columns)
        kl_global: list[Tensor] = []
        if "z" in parts:
            opened = self._open_logit(parts["z"])
            active = torch.sigmoid(opened)
            assert config.global_prior is not None  # the config replaced its None
            kl_global.append(bernoulli_kl(active, opened, config.global_prior).sum(-1))
        if "log_alpha" in parts:
            alpha = torch.exp(LOGIT_SCALE * parts["log_alpha"])
            kl_global.append((scale_noise_kl(alpha, config.noise_prior) * active).sum(-1))
        if config.prior_std is not None:
            kl_global.append((columns * active).sum(-1) / (2 * config.prior_std**2))
        per_input = active.unsqueeze(1)  # (L, 1, r)
        kl_local, opened_by_input = self._local_kl(parts)
        return Kl(
            sum(kl_global[1:], kl_global[0]) if kl_global else None,
            None if kl_local is None else (kl_local * per_input).sum(-1),
            active if opened_by_input is None else opened_by_input * per_input,
        )

    def _local_kl(self, parts: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Of factors of an input, averaged over its positions: the KL of an active factor, and
        P(g > 0); each (L, B, r), None without local gates."""
        if "shifted" in parts:  # of a fused step: with the draw's noise, over the temperature
            opened = open_logit((parts["shifted"] - parts["logistic"]) * GATE_TEMPERATURE)
        elif "g" in parts:
            opened = self._open_logit(parts["g"])
        else:
            return None, None
        weights = parts.get("weights")
        probability = torch.sigmoid(opened)
        assert self.config.local_prior is not None  # the config replaced its None
        kl = bernoulli_kl(probability, opened, self.config.local_prior)
        return (
            position_mean(kl, weights, dim=2),
            position_mean(probability.detach(), weights, dim=2),
        )

    def _open_logit(self, logit: Tensor) -> Tensor:
        """Log-odds that a gate is open, from its location over `LOGIT_SCALE`."""
        return open_logit(LOGIT_SCALE * logit)

    def inclusion(self) -> Tensor:
        """P(z_k > 0), (r,); ones without a global gate."""
        z = self.task_variables().z
        if z is None:
            return torch.ones(self.rank)
        return torch.sigmoid(self._open_logit(z))

    def open_probability(self, space: RankSpace) -> Tensor:
        probability = super().open_probability(space)
        for logit in self.variables(space).gates().values():
            probability = probability * torch.sigmoid(self._open_logit(logit))
        return probability

    def open_draw(self, space: RankSpace, noise: Noise) -> Tensor:
        opened = super().open_draw(space, noise)
        for name, logit in self.variables(space).gates().items():
            opened = opened & (self._gate(name, logit, noise) > 0)
        return opened

    def input_dependence(self, space: RankSpace) -> Tensor | None:
        if not self.depends_on_input:
            return None
        variables = self.variables(space)._replace(z=None, log_alpha=None)
        multiplier = reduce(torch.mul, self._multipliers(variables, None))
        return space.mean_over_positions(multiplier).mean(dim=0)

    def mean_scale(self) -> Tensor | None:
        return self._plain_scale(None)

    def lora_draw(self, a: Tensor, noise: Noise) -> tuple[Tensor, Tensor | None]:
        if variance := self.weight_noise:
            a = gaussian_draw(a, variance**0.5 * wide(a).abs(), noise)
        return a, self._plain_scale(noise)

    def _plain_scale(self, noise: Noise | None) -> Tensor | None:
        """The multipliers (r,) of one draw or the mean, what depends on the input averaged."""
        factors = [m.flatten() for m in self._multipliers(self.task_variables(), noise)]
        if self.depends_on_input:
            average = self._calibrated()
            factors.append(average.to(factors[0]) if factors else average)
        return reduce(torch.mul, factors) if factors else None


register(
    BaraConfig,
    BaraPosterior,
    About(
        name="bara",
        title="BaRA",
        summary="adaptive rank: sparse, input-dependent factors",
        random="gates and scale of the factors, and A",
        paper="arXiv 2606.29184",
    ),
)
