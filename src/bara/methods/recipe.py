"""Everything that decides a training run, in one value that is written to and read from YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from bara.data.images import IMAGE_TASK
from bara.errors import BaraError, first_line
from bara.language.tasks import LANGUAGE_TASKS
from bara.schema import Seed, check, field_types, mapping_of, refuse_unknown

METHOD_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 16}
TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 20,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "warmup_steps": 0.06,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "group_by_length",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
}
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "probe": {},
    "setfit": {},
    "pvera": {"r": 256},
}
"""Defaults of a method's options, where `METHOD_DEFAULTS` do not suit it."""
BY_STEPS = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_kwargs", "max_grad_norm", "optim", "optim_args", "optim_target_modules"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor"),
    *("neftune_noise_alpha", "gradient_checkpointing"),
)
"""Options of training that only a method with training steps has a use for."""
METHOD_TRAINING: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 5e-5},
}
"""Defaults of a method's training, over `TRAINING_DEFAULTS`."""
LANGUAGE_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
}
"""Where language models differ from `TRAINING_DEFAULTS`."""
IMAGE_DEFAULTS: dict[str, Any] = {"train_sampling_strategy": "random"}
"""The same for images, which have no length to be grouped by."""
LARGEST_YAML = 1 << 18
"""Bytes of a YAML file: what is written by hand is far shorter, and PyYAML is slow."""
MOST_NODES = 100_000
"""Values in a YAML file, one that is named several times counted each time."""


@dataclass
class TrainRecipe:
    """One training run.

    Attributes:
        model: folder or hub name of the base model.
        data, validation: what `bara.data.tables.load_table` reads; validation is optional.
        split, validation_split: splits of hub data sets.
        output: the folder for the adapter; checkpoints go into its folder `checkpoints`.
        text_column, text_pair_column, label_column, task, max_length: see
            `bara.data.text_task.TextTask.infer`. For `task` causal-lm, multiple-choice or seq2seq
            see `bara.language.tasks.LanguageTask`, which has fixed columns; for
            image-classification `bara.data.images`.
        scoring: for multiple choice, `text` or `letter`.
        stride, max_answer_length: for question answering, see
            `bara.data.question_task.QuestionTask`.
        method: a name of `bara.methods.table.METHODS`, with the suffix `+temperature` for a
            temperature fitted on the validation table.
        method_options: fields of the method's configuration class and its own options, over
            `METHOD_DEFAULTS`.
            Without `target_modules` the attention's projections are adapted.
        model_options: arguments of the base model's `from_pretrained` (`dtype`, ...).
        training: fields of `transformers.TrainingArguments`, over `TRAINING_DEFAULTS`.
        seed: of the new weights, the order of the data and the noise in training.

    Raises:
        BaraError: a value has the wrong type or is out of range.
    """

    model: str = ""
    data: str = ""
    validation: str | None = None
    split: str | None = None
    validation_split: str | None = None
    output: str = "bara-adapter"
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    task: str | None = None
    max_length: Annotated[int, Field(lt=2**31)] = 128
    scoring: str = "text"
    stride: Annotated[int, Field(ge=0)] | None = None
    max_answer_length: Annotated[int, Field(ge=1)] = 30
    method: str = "bara"
    method_options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seed: Seed = 0

    def __post_init__(self) -> None:
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        check(_schema(), values, "recipe")
        self.model_options = {"dtype": "float32", **self.model_options}
        for group, defaults in _defaults(self.method, self.task).items():
            setattr(self, group, {**defaults, **getattr(self, group)})

    def with_options(self, options: Mapping[str, Any]) -> TrainRecipe:
        """A copy with some options changed; `training.learning_rate` names a nested one."""
        values = asdict(self)
        if {"method", "task"} & set(options):  # another method or task has other defaults
            for group, defaults in _defaults(self.method, self.task).items():
                given = values[group].items()
                values[group] = {k: v for k, v in given if k not in defaults or v != defaults[k]}
        for name, value in options.items():
            group, _, key = name.partition(".")
            if key and isinstance(values.get(group), dict):
                values[group][key] = value
            else:
                values[name] = value
        return TrainRecipe.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainRecipe:
        """A recipe from its fields.

        Raises:
            BaraError: a field is unknown, has the wrong type or is out of range.
        """
        refuse_unknown(values, {option.name for option in fields(cls)}, "recipe")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> TrainRecipe:
        """Read a YAML file.

        Raises:
            BaraError: the file is missing, not YAML, or not a recipe.
        """
        values = read_yaml(path, "recipe") or {}
        if not isinstance(values, dict):
            raise BaraError(f"the recipe {path} must be a mapping of options to values")
        return cls.from_dict(values)

    def to_yaml(self) -> str:
        """All options, the defaults among them."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


@cache
def _schema() -> Any:
    return mapping_of(field_types(TrainRecipe))


def _defaults(method: str, task: str | None) -> dict[str, dict[str, Any]]:
    base = method.lower().partition("+")[0]
    special = LANGUAGE_DEFAULTS if task in LANGUAGE_TASKS else {}
    if task == IMAGE_TASK:
        special = IMAGE_DEFAULTS
    return {
        "method_options": METHOD_OPTIONS.get(base, METHOD_DEFAULTS),
        "training": TRAINING_DEFAULTS | special | METHOD_TRAINING.get(base, {}),
    }


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text and `no` as false; this reads both as YAML 1.2 does."""


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:bool"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, of safe types only.

    Raises:
        BaraError: it is none, or larger than what is written by hand.
    """
    if len(text) > LARGEST_YAML:
        raise BaraError(f"not YAML that is read: it has more than {LARGEST_YAML:,} characters")
    try:
        value = yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML has other types too for what is no date, no number, …
        raise BaraError(f"not YAML: {' '.join(str(error).split()) or first_line(error)}") from error
    _require_small(value)
    return value


def _require_small(value: Any) -> None:
    """Refuses aliases of aliases, which a few lines can blow up to more than memory holds."""
    waiting, seen = [value], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        if seen + len(waiting) > MOST_NODES:
            raise BaraError(
                f"not YAML that is read: it has more than {MOST_NODES:,} values, its aliases "
                "written out"
            )


def read_yaml(path: str | Path, what: str) -> Any:
    """The value of a YAML file.

    Args:
        path: the file.
        what: what it is to be, for the message.

    Raises:
        BaraError: the file cannot be read or is not YAML.
    """
    try:
        with open(path, "rb") as file:
            return parse_yaml(file.read(LARGEST_YAML + 1).decode("utf-8"))
    except OSError as error:
        raise BaraError(f"cannot read the {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BaraError(f"the {what} {path} is not YAML: not UTF-8 text") from error
    except BaraError as error:
        raise BaraError(f"the {what} {path} is {error}") from error
