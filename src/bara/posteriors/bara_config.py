"""The configuration of BaRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from bara.errors import BaraError
from bara.posteriors.config import BayesianConfig, Resolved, rise

WHOLE = {"kl_weight": 1 / 6, "local_kl_weight": 0.001, "init_noise": 0.5, "weight_noise": 4.0}
"""The defaults of numbers of which a short training has only a part."""
LAYERS = 36
"""Adapted layers that have all of them; more share what these have, since both add up."""
CONVOLUTION = 0.1
"""Part of the KL's weights in a network of convolutions, whose gates they would close."""
FEW_STEPS, MANY_STEPS = 40, 120
"""Steps up to which defaults that go by them have their least part, and from which all of it."""
LEAST = 1 / 8
"""The least part of those, but for the noise on A, which few steps do without."""
RATE = 1e-3
"""The learning rate at which an optimiser step counts as one; smaller ones count for less."""
WARMUP, LONGEST_WARMUP = 0.5, 0.9
"""The default of the KL's warm-up where a new head is quick, and at most."""


@dataclass
class BaraResolved(Resolved):
    """BaRA's numbers in force.

    Attributes:
        init_noise: where the factors' relative variance alpha starts.
        weight_noise: the relative variance of the noise on A.
        whole: what those left to their defaults are in a long training, of those that depend on the
            steps.
        head_pace: how quickly a new head learns that is left slow, in (0, 1]: its input's standard
            deviation over 0.2. Steps count for so much less for the noise on A. 1 for the others.
        warmup_by_head: the warm-up is longer where the head is slow.
        trained_steps: optimiser steps of the longest training so far, at a learning rate of 1e-3:
            one that goes on with an adapter does not take away the noise that it was trained with.
    """

    init_noise: float = 0.5
    weight_noise: float = 0.0
    whole: Mapping[str, float] = field(default_factory=dict)
    head_pace: float = 1.0
    warmup_by_head: bool = True
    trained_steps: float = 0.0

    def used_by_draws(self) -> dict[str, float]:
        return {"weight_noise": self.strength * self.weight_noise}

    def give(self, name: str, value: Any) -> None:
        super().give(name, value)
        self.whole = {other: whole for other, whole in self.whole.items() if other != name}
        if name == "warmup":
            self.warmup_by_head = False

    def steps(self, num_steps: int, learning_rate: float | None = None) -> float:
        pace = 1.0 if learning_rate is None else min(1.0, learning_rate / RATE)
        return max(self.trained_steps, pace * num_steps)

    def set_by_steps(self, num_steps: int, learning_rate: float | None = None) -> None:
        self.trained_steps = self.steps(num_steps, learning_rate)
        noise = rise(self.trained_steps * self.head_pace, FEW_STEPS, MANY_STEPS)
        others = max(LEAST, rise(self.trained_steps, FEW_STEPS, MANY_STEPS))
        for name, whole in self.whole.items():
            setattr(self, name, whole * (noise if name == "weight_noise" else others))

    def set_by_head(self, pace: float) -> None:
        self.head_pace = pace
        if self.warmup_by_head:
            self.warmup = min(LONGEST_WARMUP, WARMUP / pace)


@dataclass
class BaraConfig(BayesianConfig):
    """BaRA: as much rank as the task and the input need (arXiv 2606.29184, design 2.1).

    `r` is the maximum rank; the joint effective rank is learned and reported by
    `bara.effective_rank`.
    """

    DEFAULT_GRANULARITY: ClassVar[Literal["sequence", "token"]] = "token"
    RESOLVED: ClassVar[type[Resolved]] = BaraResolved
    RETIRED: ClassVar[dict[str, Any]] = {
        "intensity": False,
        "intensity_prior": 4.0,
        "explained": None,
        "global_prior_beta": None,
        "init_logit": 3.0,
        "logit_scale": 100.0,
    }
    POSITIVE = ("noise_prior",)

    kl_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of KL_global / N; 1 is the ELBO, 0 switches it off. >= 0. None stands "
            "for 1/6, with more than 36 adapted layers for 6 / layers; where they are convolutions "
            "for a tenth of that. A short training has only a part of it, at least 1/8: see "
            "weight_noise."
        },
    )
    local_kl_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of KL_local, what is drawn per input. >= 0. None stands for 0.001, "
            "shared as kl_weight is. A short training has only a part of it, at least 1/8: see "
            "weight_noise."
        },
    )
    warmup: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of training, in [0, 1], after which the KL has its full weight. For "
            "the first 40% of it the weight is 0, then it rises linearly. None stands for 0.5, and "
            "where a new head is left slow for up to 0.9 (see head_input_std). Needs the "
            "training's progress, from bara.BayesianCallback or bara.set_progress; without either "
            "the weight is full at once."
        },
    )
    global_gate: bool = field(
        default=True,
        metadata={"help": "Learn which factors the task uses at all (z)."},
    )
    local_gate: bool = field(
        default=True,
        metadata={"help": "Learn which factors each input uses (g). Without it the mean merges."},
    )
    factor_noise: bool = field(
        default=True,
        metadata={"help": "Learn how uncertain each active factor still is (alpha)."},
    )
    global_prior: float | None = field(
        default=None,
        metadata={
            "help": "Prior probability pi, in (0, 1), that the task uses a factor. None stands for "
            "1 / r, at most 0.5: one factor per layer is expected, however large r is."
        },
    )
    local_prior: float | None = field(
        default=None,
        metadata={
            "help": "Prior probability rho, in (0, 1), that an input uses a factor. None stands "
            "for 16 / r, at most 0.25."
        },
    )
    noise_prior: float = field(
        default=1.0,
        metadata={"help": "Prior variance c > 0 of a factor, relative to its squared mean."},
    )
    init_noise: float | None = field(
        default=None,
        metadata={
            "help": "Where the factors' relative variance alpha > 0 starts. None stands for 0.5, "
            "with more than 36 adapted layers for 18 / layers. A short training has only a part of "
            "it, at least 1/8: see weight_noise."
        },
    )
    weight_noise: float | None = field(
        default=None,
        metadata={
            "help": "Variance c >= 0 of the noise on an element of A, relative to its square. It "
            "is fixed, so that it has no KL; 0 switches it off. None stands for 4, with more than "
            "36 adapted layers for 144 / layers. Few steps cannot average it out: "
            "bara.BayesianCallback, or bara.set_progress with num_steps, takes only the part "
            "(steps - 40) / 80 of it, at least 0 and at most 1. Steps count for less at learning "
            "rates below 1e-3, in proportion, and where a new head is left slow (see "
            "head_input_std)."
        },
    )
    prior_std: float | None = field(
        default=0.1,
        metadata={
            "help": "sigma_B > 0 of the prior on B's columns, which keeps long training from "
            "overfitting; None for no prior."
        },
    )
    head_input_std: float | None = field(
        default=None,
        metadata={
            "help": "How quickly a new head of one row of logits per input learns: as if its input "
            "had this standard deviation (bara.BayesianCallback sees to it, or bara.scale_head in "
            "a loop of your own). >= 0; 0 leaves the head as PEFT trains it. None finds it, up to "
            "1, by what a linear head makes of the frozen features; where that is little but "
            "not nothing, a head with an input below 0.1 is left slow, and KL and noise on A wait. "
            "Where steps are few, or slow, all of that is quicker (docs/methods.md, The head)."
        },
    )
    init_local_logit: float | None = field(
        default=None,
        metadata={
            "help": "Where the logits of the local gates start. None stands for 3 (open with "
            "P = 0.99) up to r = 11, and beyond it for gates that are open with P = 11 / r, so "
            "that the rank in use does not follow the maximum rank."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_prior is None:
            self.global_prior = _default_global_prior(self.r)
        if self.local_prior is None:
            self.local_prior = _default_local_prior(self.r)
        for name in ("global_prior", "local_prior"):
            self._require_real(name, low=0, high=1, strict=True)
        self._require_real("prior_std", low=0, strict=True, optional=True)
        self._require_real("init_noise", low=0, strict=True, optional=True)
        self._require_real("weight_noise", low=0, optional=True)
        self._require_real("init_local_logit", optional=True)
        if self.weight_noise == 0 and not self._learns_noise():
            raise BaraError(
                "BaraConfig: with global_gate, local_gate, factor_noise and weight_noise all off "
                "there is no posterior left; use peft.LoraConfig for plain LoRA."
            )

    def without_effect(self) -> list[tuple[str, str]]:
        off = []
        if not self.global_gate and self.global_prior != _default_global_prior(self.r):
            off.append(("global_prior", "global_gate is off"))
        if not self.local_gate:
            off += [(name, "local_gate is off") for name in ("init_local_logit", "granularity")]
            if self.local_prior != _default_local_prior(self.r):
                off.append(("local_prior", "local_gate is off"))
        if not self.factor_noise:
            off += [(name, "factor_noise is off") for name in ("noise_prior", "init_noise")]
        return off

    def _learns_noise(self) -> bool:
        """Whether there is a posterior besides the fixed noise."""
        return self.global_gate or self.local_gate or self.factor_noise

    def defaults(self, num_layers: int, convolutions: float) -> dict[str, Any]:
        share = min(1.0, LAYERS / num_layers)
        whole = {name: share * value for name, value in WHOLE.items()}
        for name in ("kl_weight", "local_kl_weight"):
            whole[name] *= 1 - convolutions + CONVOLUTION * convolutions
        return {**whole, "whole": whole if self._learns_noise() else {}}


def _default_global_prior(rank: int) -> float:
    return min(0.5, 1 / rank)


def _default_local_prior(rank: int) -> float:
    return min(0.25, 16 / rank)
