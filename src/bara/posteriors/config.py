"""One configuration class per method: `peft.LoraConfig` and a few documented fields more."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from peft import LoraConfig

from bara.cards.adapter_files import CALIBRATIONS
from bara.cards.method_card import write_method_card
from bara.errors import BaraError

NEEDS = "import bara (pip install bara-peft) before PEFT loads this adapter"
NOT_OPTIONS = {"resolved", "used_by_draws", "needs"}
"""Fields that are filled in, and only saved."""
TRAINING_ONLY = {
    *(
        "num_observations",
        "kl_weight",
        "local_kl_weight",
        "strength",
        "warmup",
        "head_input_std",
        "resolved",
        "needs",
    ),
}
"""Fields that predictions do not depend on."""


@dataclass(frozen=True)
class About:
    """What is said of a family wherever methods are listed.

    Attributes:
        name: what commands call it, in lower case.
        title: how its paper writes it.
        summary: what it is, in a line.
        random: what differs between draws.
        paper: its source.
    """

    name: str
    title: str
    summary: str
    random: str
    paper: str

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method."""
        return self.name.upper()


def rise(value: float, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on, and linear between."""
    return min(1.0, max(0.0, (value - start) / (end - start)))


@dataclass
class Resolved:
    """The numbers in force on one attached adapter: its configuration's, and for those left to the
    data, the layers or the steps what these made of them.

    Attributes:
        num_observations: N; None until it is known.
        kl_weight: of KL_global / N.
        local_kl_weight: of KL_local.
        strength: multiplies both.
        warmup: part of the training after which the KL has its full weight.
        frozen_nll: what a linear head on the frozen model loses on training examples that are left
            out, in nats; None where `bara.scale_head` did not look.
    """

    num_observations: int | None = None
    kl_weight: float = 1.0
    local_kl_weight: float = 0.0
    strength: float = 1.0
    warmup: float = 0.5
    frozen_nll: float | None = None

    held = False
    """Whether the KL has no weight yet, so that gates are to stay where they start (no number, and
    not saved)."""

    def used_by_draws(self) -> dict[str, float]:
        """Those that draws of the trained adapter depend on, besides its tensors."""
        return {}

    def give(self, name: str, value: Any) -> None:
        """Sets a number that the user has given."""
        setattr(self, name, value)

    def steps(self, num_steps: int, learning_rate: float | None = None) -> float:
        """What the optimiser steps of a training count for in defaults that go by them."""
        return float(num_steps)

    def set_by_steps(self, num_steps: int, learning_rate: float | None = None) -> None:
        """Adjusts defaults to the optimiser steps that training is going to take, and how long."""

    def set_by_head(self, pace: float) -> None:
        """Adjusts defaults to how quickly a new head learns, in (0, 1]; known before the steps."""


class PeftName(str):
    """A method's name as PEFT handles the members of its own enumeration of methods."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The name itself."""
        return str(self)

    @property
    def name(self) -> str:
        """The name itself."""
        return str(self)


@dataclass
class BayesianConfig(LoraConfig):
    """What all Bayesian adapters share: the weights of the ELBO (design 2.4).

        loss = -(1/N) sum log p(y | x, draw)
               + kl_weight / N * KL_global + local_kl_weight * KL_local

    Every field of `peft.LoraConfig` is available and means what it means there. Values out of range
    raise `BaraError` (a `ValueError`) when the config is made.
    """

    ABOUT: ClassVar[About]
    """Set by the family's registration."""
    DEFAULT_GRANULARITY: ClassVar[Literal["sequence", "token"]] = "sequence"
    RESOLVED: ClassVar[type[Resolved]] = Resolved
    """The numbers that an adapter of this family has in force."""
    RETIRED: ClassVar[dict[str, Any]] = {}
    """Options of earlier versions, each with the one value that adapters can still be read with."""
    FROZEN: ClassVar[tuple[str, ...]] = ()
    """Parts of the adapter that are never trained, by PEFT's names."""
    POSITIVE: ClassVar[tuple[str, ...]] = ()
    """Fields that must be numbers above 0."""
    HAS_KL: ClassVar[bool] = True
    """Whether there is a KL for `strength` to multiply."""
    UNUSED: ClassVar[tuple[str, ...]] = ()
    """Fields of all families that this one has no use for."""

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
    strength: float = field(
        default=1.0,
        metadata={
            "help": "Multiplies kl_weight and local_kl_weight, whether given or left to the "
            "layers, and for BaRA weight_noise: one number to choose, > 0. Above 1 holds the "
            "adapter closer to its prior."
        },
    )
    warmup: float | None = field(
        default=0.5,
        metadata={
            "help": "Fraction of training, in [0, 1], after which the KL has its full weight. For "
            "the first 40% of it the weight is 0, so that B leaves zero before anything "
            "pulls it back, then it rises linearly. Needs the training's progress: "
            "bara.BayesianCallback gives it, or bara.set_progress in a loop of your own; without "
            "either the weight is full at once."
        },
    )
    head_input_std: float | None = field(
        default=0.0,
        metadata={
            "help": "How quickly a new head of one row of logits per input learns: as if its input "
            "had this standard deviation (bara.BayesianCallback sees to it, or bara.scale_head in "
            "a loop of your own). >= 0; 0 leaves the head as PEFT trains it."
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

    resolved: Any = field(
        default=None,
        metadata={
            "help": "The numbers in force on the attached adapter (`bara.posteriors.config."
            "Resolved`), saved with it; not an option. None before the adapter is attached."
        },
    )

    needs: str = field(
        default=NEEDS, metadata={"help": "What reads this file needs; not an option."}
    )
    used_by_draws: Any = field(
        default=None,
        metadata={
            "help": "What draws depend on besides the tensors, of `resolved`: written when saving, "
            "and compared when adapters are hot-swapped; not an option."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # a string: PEFT's type mappings take it, and its enumeration stays as it is
        self.peft_type = PeftName(self.ABOUT.peft_type)
        if isinstance(self.resolved, dict):  # as JSON brings it back
            self.resolved = self._resolved_from(self.resolved)
        self._refuse_other_variants()
        self._require("r", self.r, isinstance(self.r, int) and self.r >= 1, "an integer >= 1")
        n = self.num_observations
        self._require("num_observations", n, n is None or n >= 1, "None or an integer >= 1")
        for name in ("kl_weight", "local_kl_weight"):
            self._require_real(name, low=0, optional=getattr(type(self), name) is None)
        self._require_real("warmup", low=0, high=1, optional=type(self).warmup is None)
        self._require_real("head_input_std", low=0, optional=True)
        for name in ("strength", *self.POSITIVE):
            self._require_real(name, low=0, strict=True)
        self._require(
            "granularity",
            self.granularity,
            self.granularity in ("auto", "sequence", "token"),
            "'auto', 'sequence' or 'token'",
        )

        if self.resolved is None:  # what was saved with an adapter loads, whatever it is
            self._warn_of_what_has_no_effect()

    def without_effect(self) -> list[tuple[str, str]]:
        """Fields that nothing reads, as the others stand, and why."""
        return [(name, f"{type(self).__name__} has no use for it") for name in self.UNUSED]

    def _warn_of_what_has_no_effect(self) -> None:
        # no error: a comparison gives all families the same options
        defaults = {option.name: option.default for option in fields(self)}
        for name, why in self.without_effect():
            value = getattr(self, name)
            off = name in ("kl_weight", "local_kl_weight") and value == 0
            if not off and value != defaults[name]:
                warnings.warn(
                    f"{type(self).__name__}: {name} = {value!r} has no effect ({why}).",
                    stacklevel=4,  # where the configuration is made
                )

    def resolve(self, num_layers: int, convolutions: float = 0.0) -> Resolved:
        """The numbers in force on an adapter of this many layers, before training.

        What was saved with an adapter is taken over; a field that is set has the last word.
        """
        num_layers = max(1, num_layers)  # PEFT allows none
        resolved = self.RESOLVED(**self.defaults(num_layers, convolutions))
        names = [number.name for number in fields(resolved)]
        if self.resolved is not None:
            resolved = copy.copy(self.resolved)
        for name in names:
            if (given := getattr(self, name, None)) is not None:
                resolved.give(name, given)
        return resolved

    def __setattr__(self, name: str, value: Any) -> None:
        """A number that is given to an attached adapter is in force from then on."""
        super().__setattr__(name, value)
        resolved = self.__dict__.get("resolved")
        if isinstance(resolved, Resolved) and value is not None and name in vars(resolved):
            resolved.give(name, value)

    def defaults(self, num_layers: int, convolutions: float) -> dict[str, Any]:
        """What the fields left at None stand for on this many layers, by name.

        Args:
            num_layers: adapted layers.
            convolutions: the part of them that are convolutions.
        """
        return {}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the configuration; beside it the README.md gets the method and how to load it.

        What was measured or calibrated on earlier weights is removed. `PeftModel.save_pretrained`
        calls this after it has written its own model card.
        """
        super().save_pretrained(save_directory, **kwargs)
        for name in CALIBRATIONS:
            (Path(save_directory) / name).unlink(missing_ok=True)
        about = self.ABOUT
        write_method_card(
            save_directory,
            self,
            title=about.title,
            what=f"{about.title} ({about.paper}), {about.summary}",
            num_observations=(self.resolved or self).num_observations,
        )

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Leaves out the options of earlier versions, which a saved adapter may name.

        Raises:
            BaraError: one has a value that this version cannot read.
        """
        for name, readable in cls.RETIRED.items():
            value = kwargs.pop(name, readable)
            if value != readable:
                raise BaraError(
                    f"{cls.__name__}: {name} = {value!r} of an earlier version is no longer "
                    f"supported, only {readable!r}; train again, or load it with bara 0.1."
                )
        return super().check_kwargs(**kwargs)

    def _resolved_from(self, saved: dict[str, Any]) -> Resolved:
        try:
            return self.RESOLVED(**saved)
        except TypeError as error:
            known = ", ".join(number.name for number in fields(self.RESOLVED))
            raise BaraError(
                f"{type(self).__name__}: resolved must be numbers among {known}, got {saved!r}."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """All fields, as PEFT saves and compares them."""
        used = self.resolved.used_by_draws() if self.resolved else None
        return {**super().to_dict(), "used_by_draws": used}

    @classmethod
    def hotswap_keys(cls) -> list[str]:
        """Fields that have to be equal for one adapter's tensors to be put in another's place."""
        own = {option.name for option in fields(cls)} - {
            option.name for option in fields(LoraConfig)
        }
        return sorted(own - TRAINING_ONLY | {"r", "rank_pattern"})

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
