"""One configuration class per method: `peft.LoraConfig` and a few documented fields more."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from peft import LoraConfig

from bara.errors import BaraError
from bara.posteriors.schedule import LossSchedule, rise


@dataclass
class BayesianConfig(LoraConfig):
    """What all Bayesian adapters share: the weights of the ELBO (design 2.4).

        loss = -(1/N) sum log p(y | x, draw)
               + kl_weight / N * KL_global + local_kl_weight * KL_local

    Every field of `peft.LoraConfig` is available and means what it means there. Values out of range
    raise `BaraError` (a `ValueError`) when the config is made.
    """

    METHOD: ClassVar[str]
    DEFAULT_GRANULARITY: ClassVar[Literal["sequence", "token"]] = "sequence"
    FROZEN: ClassVar[tuple[str, ...]] = ()
    """Parts of the adapter that are never trained, by PEFT's names."""
    POSITIVE: ClassVar[tuple[str, ...]] = ()
    """Fields that must be numbers above 0."""

    num_observations: int | None = field(
        default=None,
        metadata={
            "help": "N, the number of terms the data loss averages over in the whole training set: "
            "examples for classification and regression, label tokens for language models. "
            "Filled in by bara.BayesianCallback; at least 1."
        },
    )
    kl_weight: float | None = field(
        default=1.0,
        metadata={"help": "Weight of KL_global / N; 1 is the ELBO, 0 switches it off. >= 0."},
    )
    local_kl_weight: float | None = field(
        default=0.001,
        metadata={"help": "Weight of KL_local, what is drawn per input. >= 0."},
    )
    warmup: float = field(
        default=0.5,
        metadata={
            "help": "Fraction of training, in [0, 1], after which the KL has its full weight. For "
            "the first 40% of it the weight is 0, so that B leaves zero before anything "
            "pulls it back, then it rises linearly. Needs the training's progress: "
            "bara.BayesianCallback gives it, or bara.set_progress in a loop of your own; without "
            "either the weight is full at once."
        },
    )
    granularity: Literal["auto", "sequence", "token"] = field(
        default="auto",
        metadata={
            "help": "What adapts to what: 'sequence' pools over an input (never for a causal "
            "language model: it would leak the future), 'token' lets every token decide for "
            "itself. 'auto' is 'token' for models that generate, 'sequence' for convolutions, "
            "else the method's default: 'token' for BaRA, 'sequence' for BaLoRA."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # a plain string: PEFT's type mappings take it, and its enum stays as it is
        self.peft_type = self.METHOD
        self._refuse_other_variants()
        self._require("r", self.r, isinstance(self.r, int) and self.r >= 1, "an integer >= 1")
        n = self.num_observations
        self._require("num_observations", n, n is None or n >= 1, "None or an integer >= 1")
        for name in ("kl_weight", "local_kl_weight"):
            self._require_real(name, low=0, optional=getattr(type(self), name) is None)
        self._require_real("warmup", low=0, high=1)
        for name in self.POSITIVE:
            self._require_real(name, low=0, strict=True)
        self._require(
            "granularity",
            self.granularity,
            self.granularity in ("auto", "sequence", "token"),
            "'auto', 'sequence' or 'token'",
        )

    def set_by_layers(self, num_layers: int) -> None:
        """Fills in the fields left at None that depend on how many layers the adapter is on."""

    def set_by_steps(self, num_steps: int) -> None:
        """Adjusts what was filled in to the optimiser steps that training is going to take."""

    def loss_schedule(self) -> LossSchedule | None:
        """A new schedule that the adapter's KL and noise follow; None without one."""
        return None

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the configuration; beside it the README.md gets the method and how to load it.

        `PeftModel.save_pretrained` calls this after it has written its own model card.
        """
        from bara.card import write_method_card  # not needed to train

        super().save_pretrained(save_directory, **kwargs)
        write_method_card(save_directory, self)

    def _require(self, name: str, value: Any, valid: bool, what: str) -> None:
        if not valid:
            raise BaraError(f"{type(self).__name__}: {name} must be {what}, got {value!r}.")

    def _require_real(
        self,
        name: str,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        strict: bool = False,
        optional: bool = False,
    ) -> None:
        """Requires low <= value <= high, or low < value < high when strict."""
        value = getattr(self, name)
        if optional and value is None:
            return
        left, right = ("(" if strict else "["), (")" if strict or math.isinf(high) else "]")
        bounds = f"a number in {left}{low}, {high}{right}"
        valid = (
            isinstance(value, (int, float))
            and math.isfinite(value)
            and (low < value < high if strict else low <= value <= high)
        )
        self._require(name, value, valid, bounds + (" or None" if optional else ""))

    def _refuse_other_variants(self) -> None:
        for option in fields(self):
            if option.metadata.get("is_lora_variant") and getattr(self, option.name):
                raise BaraError(
                    f"{type(self).__name__}: {option.name} selects another variant of LoRA, which "
                    "cannot be combined with a posterior; leave it at its default."
                )
        if self.use_qalora:
            raise BaraError(
                f"{type(self).__name__}: use_qalora cannot be combined with a posterior."
            )
        self._require(
            "init_lora_weights",
            self.init_lora_weights,
            self.init_lora_weights in (True, "gaussian", "eva"),
            "True, 'gaussian' or 'eva', which start with B = 0 and so with the unchanged model",
        )


GLOBAL_KL, LOCAL_KL, WEIGHT_NOISE, FACTOR_NOISE = 3.0, 0.018, 72.0, 16.0
"""What all layers share of BaRA's default weights of the KL, of the variance of A's noise, and of
the variance of the factors' noise at the start."""
FIRST_NOISY, FULLY_NOISY = 40, 120
"""Optimiser steps up to which the default of A's noise is 0, and from which it is whole."""


@dataclass
class BaraConfig(BayesianConfig):
    """BaRA: as much rank as the task and the input need (arXiv 2606.29184, design 2.1).

    `r` is the maximum rank; the joint effective rank is learned and reported by
    `bara.effective_rank`.
    """

    METHOD: ClassVar[str] = "BARA"
    DEFAULT_GRANULARITY: ClassVar[Literal["sequence", "token"]] = "token"
    POSITIVE = ("noise_prior", "intensity_prior", "logit_scale")

    kl_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of KL_global / N; 1 is the ELBO, 0 switches it off. >= 0. None stands "
            "for min(1, 3 / number of adapted layers): the KL is a sum over layers, so that its "
            "whole weight does not grow with the model's depth."
        },
    )
    local_kl_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of KL_local, what is drawn per input. >= 0. None stands for 0.018 / "
            "number of adapted layers."
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
    intensity: bool = field(
        default=False,
        metadata={"help": "Let the input scale its active factors (Weibull posterior)."},
    )
    global_prior: float | None = field(
        default=None,
        metadata={
            "help": "Prior probability pi, in (0, 1), that the task uses a factor. None stands for "
            "1 / r, at most 0.5: one factor per layer is expected, however large r is."
        },
    )
    global_prior_beta: tuple[float, float] | None = field(
        default=None,
        metadata={
            "help": "(a, b) > 0: give pi a Beta(a, b) hyper-prior instead of a fixed value, so "
            "that each layer learns its own sparsity."
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
            "help": "Where the factors' relative variance alpha > 0 starts. None stands for "
            "min(0.5, 16 / number of adapted layers)."
        },
    )
    weight_noise: float | None = field(
        default=None,
        metadata={
            "help": "Variance c >= 0 of the noise on an element of A, relative to its square. It "
            "is fixed, so that it has no KL; 0 switches it off. None stands for min(4, 72 / number "
            "of adapted layers): the noise of all layers adds up too. Few steps cannot average it "
            "out: bara.BayesianCallback, or bara.set_progress with num_steps, takes only the part "
            "(steps - 40) / 80 of it, at least 0 and at most 1."
        },
    )
    explained: tuple[float, float] | None = field(
        default=None,
        metadata={
            "help": "(start, end), 0 <= start < end <= 1: the KL and the noise on A wait until the "
            "fit has explained the share `start` of the data loss that it began with, and are "
            "whole from `end` on; (0.2, 0.5) helps where learning is slow or texts are few, for "
            "gates otherwise close before their factors have learned. It replaces the dependence "
            "of weight_noise on the steps; the warm-up stays. None follows the steps only."
        },
    )
    prior_std: float | None = field(
        default=0.1,
        metadata={
            "help": "sigma_B > 0 of the prior on B's columns, which keeps long training from "
            "overfitting; None for no prior."
        },
    )
    intensity_prior: float = field(
        default=4.0,
        metadata={"help": "Shape a > 0 of the intensities' Gamma(a, a) prior, whose mean is 1."},
    )
    init_logit: float = field(
        default=3.0,
        metadata={"help": "Where the logits of the gates start; 3 is open with P = 0.99."},
    )
    init_local_logit: float | None = field(
        default=None,
        metadata={
            "help": "Where the logits of the local gates start. None stands for init_logit up to "
            "r = 11, and beyond it for gates that are open with P = 11 / r, so that the rank in "
            "use does not follow the maximum rank."
        },
    )
    logit_scale: float = field(
        default=100.0,
        metadata={
            "help": "Fixed factor > 0 between parameter and logit (and log alpha): at LoRA's "
            "learning rates gates with factor 1 hardly move."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # what weight_noise is filled in with when the adapter is attached
        self.whole_noise: float | None = None
        for name in ("global_prior_beta", "explained"):
            if isinstance(getattr(self, name), list):  # as JSON brings it back
                setattr(self, name, tuple(getattr(self, name)))
        beta = self.global_prior_beta
        self._require(
            "global_prior_beta",
            beta,
            beta is None or (len(beta) == 2 and all(value > 0 for value in beta)),
            "None or two positive numbers",
        )
        part = self.explained
        self._require(
            "explained",
            part,
            part is None or (len(part) == 2 and 0 <= part[0] < part[1] <= 1),
            "None or two numbers, 0 <= start < end <= 1",
        )
        if self.global_prior is None:
            self.global_prior = min(0.5, 1 / self.r)
        if self.local_prior is None:
            self.local_prior = min(0.25, 16 / self.r)
        for name in ("global_prior", "local_prior"):
            self._require_real(name, low=0, high=1, strict=True)
        self._require_real("prior_std", low=0, strict=True, optional=True)
        self._require_real("init_noise", low=0, strict=True, optional=True)
        self._require_real("weight_noise", low=0, optional=True)
        self._require_real("init_logit")
        self._require_real("init_local_logit", optional=True)
        if self.weight_noise == 0 and not self._learns_noise():
            raise BaraError(
                "BaraConfig: with global_gate, local_gate, factor_noise, intensity and "
                "weight_noise all off there is no posterior left; use peft.LoraConfig for plain "
                "LoRA."
            )

    def _learns_noise(self) -> bool:
        """Whether there is a posterior besides the fixed noise."""
        return self.global_gate or self.local_gate or self.factor_noise or self.intensity

    def set_by_layers(self, num_layers: int) -> None:
        num_layers = max(1, num_layers)  # PEFT can attach to none
        if self.kl_weight is None:
            self.kl_weight = min(1.0, GLOBAL_KL / num_layers)
        if self.local_kl_weight is None:
            self.local_kl_weight = LOCAL_KL / num_layers
        if self.init_noise is None:
            self.init_noise = min(0.5, FACTOR_NOISE / num_layers)
        if self.weight_noise is None:
            self.whole_noise = self.weight_noise = min(4.0, WEIGHT_NOISE / num_layers)

    def set_by_steps(self, num_steps: int) -> None:
        if self.explained is None and self.whole_noise is not None and self._learns_noise():
            self.weight_noise = self.whole_noise * rise(num_steps, FIRST_NOISY, FULLY_NOISY)

    def loss_schedule(self) -> LossSchedule | None:
        return None if self.explained is None else LossSchedule(*self.explained)


@dataclass
class BaloraConfig(BayesianConfig):
    """BaLoRA: LoRA with input-adaptive Gaussian noise on A (arXiv 2605.08110, design 2.2).

    Its mean is exactly a LoRA adapter and merges exactly.
    """

    METHOD: ClassVar[str] = "BALORA"

    kl_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of KL_global / N, >= 0. The KL counts every element of A, so that "
            "at 1, the ELBO, few examples hold alpha at the prior's c for every input."
        },
    )
    dropout_prior: float = field(
        default=0.5,
        metadata={
            "help": "The dropout rate p in (0, 1) whose noise is the prior: relative variance "
            "c = p / (1 - p)."
        },
    )
    init_noise: float | None = field(
        default=None,
        metadata={"help": "Where the relative variance alpha > 0 starts; None for the prior's c."},
    )
    hidden_size: int = field(
        default=16,
        metadata={"help": "Width >= 1 of the network that maps an input to its alpha."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_real("dropout_prior", low=0, high=1, strict=True)
        self._require_real("init_noise", low=0, strict=True, optional=True)
        self._require("hidden_size", self.hidden_size, self.hidden_size >= 1, "an integer >= 1")

    @property
    def noise_prior(self) -> float:
        """c = p / (1 - p), the prior variance relative to the squared mean."""
        return self.dropout_prior / (1 - self.dropout_prior)


@dataclass
class BlobConfig(BayesianConfig):
    """BLoB: a Gaussian on every element of A, trained by backpropagation (arXiv 2406.11675).

    Its mean is exactly a LoRA adapter and merges exactly.
    """

    METHOD: ClassVar[str] = "BLOB"
    POSITIVE = ("prior_std", "init_noise")

    kl_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of KL_global / N, >= 0. The KL counts every element of A: at 1, the "
            "ELBO, few examples hold most of A at the prior."
        },
    )
    prior_std: float = field(
        default=0.2, metadata={"help": "beta > 0, the standard deviation of the prior on A."}
    )
    init_noise: float = field(
        default=0.05,
        metadata={
            "help": "epsilon > 0: G starts uniformly in [epsilon / sqrt 2, epsilon], and the "
            "standard deviation is G^2."
        },
    )


@dataclass
class ScalablConfig(BayesianConfig):
    """ScalaBL: a Gaussian over the r-dimensional diagonal between B and A (arXiv 2506.21408).

    Its mean is a LoRA adapter and merges exactly.
    """

    METHOD: ClassVar[str] = "SCALABL"
    POSITIVE = ("prior_std", "init_noise")

    prior_std: float = field(
        default=1.0, metadata={"help": "Standard deviation > 0 of the prior on the diagonal."}
    )
    init_noise: float = field(
        default=0.05,
        metadata={"help": "Where the diagonal's standard deviation > 0 starts."},
    )


@dataclass
class RankwiseConfig(BayesianConfig):
    """Rank-wise variational dropout, also called BayesLoRA (arXiv 2506.22809).

    Its mean is exactly a LoRA adapter and merges exactly.
    """

    METHOD: ClassVar[str] = "RANKWISE"

    kl_weight: float = field(
        default=0.001,
        metadata={
            "help": "Weight of KL_global / N, >= 0. The KL counts every element of A: at 1, the "
            "ELBO, few examples let noise drown every factor."
        },
    )
    init_log_variance: float = field(
        default=-8.0,
        metadata={"help": "Where log sigma^2 of the factors' noise on A starts, in [-20, 2]."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_real("init_log_variance", low=-20, high=2)


@dataclass
class McDropoutConfig(BayesianConfig):
    """MC-dropout: dropout on the adapter's inputs that stays on in prediction (arXiv 1506.02142).

    Its mean is exactly a LoRA adapter and merges exactly. There is no KL: give a weight decay to
    the optimiser for a Gaussian prior.
    """

    METHOD: ClassVar[str] = "MC-DROPOUT"

    dropout_rate: float = field(
        default=0.1, metadata={"help": "Probability in (0, 1) that a feature is dropped."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_real("dropout_rate", low=0, high=1, strict=True)


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

    METHOD: ClassVar[str] = "CERTIFIED"
    FROZEN: ClassVar[tuple[str, ...]] = ("lora_A",)
    POSITIVE = ("logit_scale",)

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
    logit_scale: float = field(
        default=10.0,
        metadata={"help": "Fixed factor > 0 between parameters and logits or log(std)."},
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
