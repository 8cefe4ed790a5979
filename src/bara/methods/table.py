"""Every method by its name: what it trains, what is random in it, where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from peft import AdaLoraConfig, LoraConfig, MontecloraConfig, PeftConfig, PveraConfig
from pydantic import Field
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from bara.cards.adapter_files import config_types
from bara.data.images import IMAGE_TASK
from bara.data.tasks import TABLE_TASKS
from bara.errors import BaraError, first_line
from bara.language.tasks import GENERATING_TASKS, LANGUAGE_TASKS
from bara.methods.adalora import AdaloraTrainer, adalora_options
from bara.methods.ensemble import EnsembleOptions
from bara.methods.ivon import IvonOptions, IvonTrainer
from bara.methods.laplace import LaplaceOptions, LaplaceTrainer
from bara.methods.probabilistic_peft import MontecloraTrainer, PveraTrainer, monteclora_options
from bara.methods.probe import ProbeOptions, ProbeTrainer, probe_options
from bara.methods.recipe import BY_STEPS, TRAINING_DEFAULTS, TrainRecipe
from bara.methods.setfit import SetfitOptions, train_setfit
from bara.methods.tfb import TfbOptions, TfbTrainer
from bara.posteriors.config import NOT_OPTIONS
from bara.posteriors.registry import Family, for_each_family
from bara.schema import NotNegative, Positive, check, field_types, mapping_of, refuse_unknown, shown
from bara.training.trainer import AdapterTrainer

TEMPERED = "+temperature"
"""Suffix of a method's name for a temperature fitted on held-out data."""


ELSEWHERE = {"output_dir": "output", "seed": "seed", "data_seed": "seed"}
"""Options of `TrainingArguments` that the recipe sets from a field of its own."""
TASKS = (*TABLE_TASKS, *LANGUAGE_TASKS, IMAGE_TASK)
READ_BY = {
    "text_column": tuple(TABLE_TASKS),
    "text_pair_column": tuple(TABLE_TASKS),
    "label_column": (*TABLE_TASKS, IMAGE_TASK),
    "max_length": (*TABLE_TASKS, *LANGUAGE_TASKS),
    "scoring": ("multiple-choice",),
    "stride": ("question-answering",),
    "max_answer_length": ("question-answering",),
}
"""Options of a recipe that some tasks have no use for, and the tasks that have."""
NOT_SET = {
    *NOT_OPTIONS,
    *("peft_type", "task_type", "peft_version", "auto_mapping"),
    *("base_model_name_or_path", "revision", "inference_mode"),
}
"""Fields of configurations that follow from the rest of the recipe."""
MAX_RANK = 65_536
"""More than the width of any model."""

_Count = Annotated[int, Field(ge=1, le=1_000_000)]
_REPORTS = Literal["all", "none", *INTEGRATION_TO_CALLBACK]  # type: ignore[valid-type]
TRAINING_TYPES = field_types(TrainingArguments) | {
    "num_train_epochs": Annotated[float, Field(gt=0, le=1e6)],
    "learning_rate": Positive,
    **dict.fromkeys(("weight_decay", "warmup_steps", "max_grad_norm"), NotNegative),
    **dict.fromkeys(("logging_steps", "save_steps"), Positive),
    "eval_steps": Positive | None,
    "max_steps": Annotated[int, Field(ge=-1)],
    "per_device_train_batch_size": _Count,
    "per_device_eval_batch_size": _Count,
    "gradient_accumulation_steps": _Count,
    "dataloader_num_workers": Annotated[int, Field(ge=0, le=256)],
    "report_to": _REPORTS | list[_REPORTS] | None,
}
"""Types of the options of training, narrower where `TrainingArguments` takes what cannot train."""
_TRAINING = mapping_of(TRAINING_TYPES)


@dataclass(frozen=True)
class NoOptions:
    """A method without options beyond those of its configuration."""


@dataclass(frozen=True)
class Method:
    """One way to fine-tune a model.

    Attributes:
        summary: what it is, in a line.
        random: what differs between draws.
        paper: its source.
        config: class of PEFT's configuration; None for full fine-tuning.
        options: dataclass of the method's own options.
        translate: makes the configuration's options of those given and the method's own.
        trainer: how it trains.
        package: a package it needs, which is in the extra of the same name.
        tasks: what it can be trained for.
        head_only: it adapts nothing, and has no options of an adapter.
        mean_pooled: it reads the mean of the last hidden states, whatever the base model's own
            head reads.
        by_steps: it trains by gradient steps, with a learning rate and epochs.
        fit: what trains it in place of `trainer`: a function of the model, the task, the table,
            the recipe, the method's own options and callbacks.
    """

    summary: str
    random: str
    paper: str
    config: type[PeftConfig] | None = LoraConfig
    options: type = NoOptions
    translate: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None
    trainer: type[AdapterTrainer] = AdapterTrainer
    package: str = ""
    tasks: tuple[str, ...] = TASKS
    head_only: bool = False
    mean_pooled: bool = False
    by_steps: bool = True
    fit: Callable[..., None] | None = None

    @property
    def ensemble(self) -> bool:
        """Whether several adapters are trained, one after the other."""
        return issubclass(self.options, EnsembleOptions)

    @property
    def has_strength(self) -> bool:
        """Whether there is a KL whose weight can be chosen."""
        return bool(getattr(self.config, "HAS_KL", False))

    def check(self, options: Mapping[str, Any], flags: Mapping[str, str] | None = None) -> None:
        """Raises `BaraError` for an option that is unknown or of a wrong type, or a package that is
        missing; `flags` are what the user typed for an option."""
        known, schema = self._known()
        for option, flag in (flags or {}).items():
            group, _, name = option.partition(".")
            if group == "method_options" and name not in known:
                raise BaraError(f"{flag} is not for this method ({self.summary}): leave it out")
        refuse_unknown(options, known, "method_options")
        check(schema, options, "method_options", flags=flags)
        self.configure(options)
        if self.package and find_spec(self.package) is None:
            raise BaraError(f"the method needs a package: pip install 'bara-peft[{self.package}]'")

    def knows(self, option: str) -> bool:
        """Whether it has an option of this name."""
        return option in self._known()[0]

    def _known(self) -> tuple[set[str], Any]:
        return _options_of(None if self.head_only else self.config, self.options)  # type: ignore[arg-type]

    def check_task(self, task: str) -> None:
        """Raises `BaraError` for a task that the method is not for."""
        if task not in self.tasks:
            raise BaraError(f"{self.summary}: this is for {' and '.join(self.tasks)}, not {task}")

    def own_options(self, options: Mapping[str, Any]) -> Any:
        """The method's own options, checked.

        Raises:
            BaraError: one has a value that the method does not take.
        """
        known = {option.name for option in fields(self.options)}
        try:
            return self.options(**{key: value for key, value in options.items() if key in known})
        except BaraError:
            raise
        except (ValueError, TypeError) as error:  # PEFT's
            raise BaraError(f"method_options: {first_line(error)}") from error

    def configure(self, options: Mapping[str, Any], **more: Any) -> PeftConfig | None:
        """PEFT's configuration with these options; None for a method without one.

        Raises:
            BaraError: an option of the method or of the configuration is out of range.
        """
        self.own_options(options)
        if self.config is None:
            return None
        try:
            return self.config(**{**self.config_options(options), **more})
        except BaraError:
            raise
        except (ValueError, TypeError, ImportError) as error:  # PEFT's
            raise BaraError(f"method_options: {first_line(error)}") from error

    def config_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of PEFT's configuration."""
        assert self.config is not None
        known = {option.name for option in fields(self.config)}
        given = {key: value for key, value in options.items() if key in known}
        return self.translate(given, self.own_options(options)) if self.translate else given


@cache
def _options_of(config: type[PeftConfig] | None, own: type) -> tuple[set[str], Any]:
    """Names of the options that a method takes, and the schema of all that it has."""
    types: dict[str, Any] = field_types(own)
    if config is not None:
        retired = getattr(config, "RETIRED", ())  # a saved adapter may name these, a new one not
        types |= {name: t for name, t in config_types(config).items() if name not in retired}
    if "r" in types:
        types["r"] = Annotated[int, Field(ge=1, le=MAX_RANK)]
    return types.keys() - NOT_SET, mapping_of(types)


METHODS: dict[str, Method] = {
    "probe": Method(
        "logistic or ridge regression on the frozen model's mean-pooled features",
        "the head",
        "arXiv 1610.01644",
        options=ProbeOptions,
        translate=probe_options,
        trainer=ProbeTrainer,
        tasks=("classification", "regression"),
        head_only=True,
        mean_pooled=True,
        by_steps=False,
    ),
    "setfit": Method(
        "SetFit: the encoder tuned by contrasting texts, then logistic regression",
        "nothing",
        "arXiv 2209.11055",
        config=None,
        options=SetfitOptions,
        package="setfit",
        tasks=("classification",),
        mean_pooled=True,
        by_steps=False,
        fit=train_setfit,
    ),
    "lora": Method(
        "LoRA by maximum likelihood; MAP with training.weight_decay",
        "nothing",
        "arXiv 2106.09685",
    ),
    "full": Method("full fine-tuning; the folder holds the model", "nothing", "", config=None),
    "adalora": Method(
        "LoRA whose rank is shared out among the layers",
        "nothing",
        "arXiv 2303.10512",
        config=AdaLoraConfig,
        translate=adalora_options,
        trainer=AdaloraTrainer,
    ),
    "ensemble": Method(
        "LoRA adapters trained from different seeds on one base model",
        "the member",
        "arXiv 1612.01474",
        options=EnsembleOptions,
    ),
    "tfb": Method(
        "the largest isotropic noise that a trained LoRA adapter's loss bears",
        "A",
        "arXiv 2412.05723",
        options=TfbOptions,
        trainer=TfbTrainer,
        tasks=("classification", "regression"),
    ),
    "laplace": Method(
        "a Laplace approximation around a trained LoRA adapter",
        "A and B (linearised), or the last layer",
        "arXiv 2308.13111",
        options=LaplaceOptions,
        trainer=LaplaceTrainer,
        package="laplace",
        tasks=("classification",),
    ),
    "ivon": Method(
        "a Gaussian on every trained weight, from the optimiser IVON",
        "all trained weights",
        "arXiv 2506.14280",
        options=IvonOptions,
        trainer=IvonTrainer,
        package="ivon",
    ),
    "monteclora": Method(
        "PEFT's MonteCLoRA: noise on A in training, its mean in prediction",
        "nothing",
        "arXiv 2411.04358",
        options=MontecloraConfig,
        translate=monteclora_options,
        trainer=MontecloraTrainer,
    ),
    "pvera": Method(
        "PEFT's PVeRA: Gaussian activations between shared frozen matrices",
        "activations, for every token",
        "arXiv 2512.07703",
        config=PveraConfig,
        trainer=PveraTrainer,
    ),
}
"""All methods by name, with every posterior family. Each also exists with `+temperature`."""


def _add(family: Family) -> None:
    about = family.config.ABOUT
    METHODS[about.name] = Method(about.summary, about.random, about.paper, config=family.config)


for_each_family(_add)


def parse_method(name: str, typed: str = "method") -> tuple[Method, bool]:
    """A method by name, and whether a temperature is fitted on top of it.

    Args:
        name: of the method, with `+temperature` or without.
        typed: what the user calls the option.

    Raises:
        BaraError: there is no such method.
    """
    base = name.lower().removesuffix(TEMPERED)
    refuse_unknown([base], METHODS, typed)
    return METHODS[base], base != name.lower()


def _refuse_unread(recipe: TrainRecipe, typed: Mapping[str, str]) -> None:
    """Refuses options that nothing would read in this run."""
    defaults = {option.name: option.default for option in fields(recipe)}
    task = recipe.task or "classification"
    for name, tasks in READ_BY.items():
        given = name in typed or getattr(recipe, name) != defaults[name]
        if given and task not in tasks:
            what = f"{typed.get(name, name)} has no use for {task}"
            raise BaraError(f"{what}, but for {' and '.join(tasks)}: leave it out")
    if recipe.validation_split is not None and recipe.validation is None:
        raise BaraError("validation_split is of --validation: give that too, or leave it out")


def check_recipe(recipe: TrainRecipe, flags: Mapping[str, str] | None = None) -> None:
    """Checks the method, and the names and values of all options.

    Args:
        recipe: of a run.
        flags: what the user typed for an option, such as `--epochs` for
            `training.num_train_epochs`; messages say that.

    Raises:
        BaraError: a name is unknown (the message has the nearest that is known), a value is of
            the wrong type or out of range, or the method does not fit the task.
    """
    typed = flags or {}
    if not recipe.model:
        raise BaraError("which model? Give a folder or a hub name with --model")
    if recipe.task is not None and recipe.task not in TASKS:
        name = typed.get("task", "task")
        raise BaraError(f"{name} must be {', '.join(TASKS)}, not {shown(recipe.task)}")
    _refuse_unread(recipe, typed)
    method, tempered = parse_method(recipe.method, typed.get("method", "method"))
    method.check(recipe.method_options, flags)
    if recipe.task is not None:
        method.check_task(recipe.task)
    if tempered and recipe.task in (*GENERATING_TASKS, "question-answering"):
        raise BaraError(
            f"method {recipe.method}: a temperature is fitted to classes, labels, choices or "
            f"numbers, which {recipe.task} does not predict; leave out +temperature"
        )
    for name, instead in ELSEWHERE.items():
        if name in recipe.training:
            raise BaraError(f"recipe: set `{instead}` instead of training.{name}")
    refuse_unknown(recipe.training, TRAINING_TYPES.keys() - ELSEWHERE, "training")
    if not method.by_steps:
        if recipe.validation and not tempered:
            raise BaraError(
                f"method {recipe.method} has no use for {typed.get('validation', '--validation')}: "
                f"leave it out, or fit a temperature there (method {recipe.method}{TEMPERED})"
            )
        for name in BY_STEPS:
            if recipe.training.get(name) != TRAINING_DEFAULTS.get(name):
                what = (flags or {}).get(f"training.{name}", f"training.{name}")
                raise BaraError(f"method {recipe.method} has no training steps: leave out {what}")
    check(_TRAINING, recipe.training, "training", flags=flags)
