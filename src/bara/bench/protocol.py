"""What a method may do with the labels that it gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from bara.errors import BaraError
from bara.methods.table import Method
from bara.schema import STRICT, Positive, check, field_types, mapping_of, refuse_unknown

Choices = Annotated[list[Positive], Field(min_length=1)]


@dataclass(frozen=True)
class Select:
    """The search that every method of a benchmark has, on its own labels.

    Attributes:
        learning_rates: to choose from; None leaves a method's own.
        strengths: of the KL (`BayesianConfig.strength`), for the methods that have one.
        epochs: each with a schedule of its own; None leaves the benchmark's.
        early_stopping: take the epoch with the least held-back loss of the mean weights.
        temperature: fit one on the held-back labels.
        held_back: share of the labels to choose on.
        again: train with what was chosen on all labels; else the best candidate is what is tested.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    learning_rates: Choices | None = None
    strengths: Choices | None = None
    epochs: Choices | None = None
    early_stopping: bool = False
    temperature: bool = False
    held_back: Annotated[float, Field(gt=0, lt=1)] = 0.2
    again: bool = True

    @classmethod
    def from_yaml(cls, values: Mapping[str, Any]) -> Select:
        """Raises `BaraError` for a name that is unknown, or a value that does not fit."""
        types = field_types(cls)
        refuse_unknown(values, types, "select")
        check(mapping_of(types), dict(values), "select")
        return cls(**values)

    def for_method(self, method: Method) -> dict[str, Any]:
        """What of it a method has a use for; empty if there is nothing to choose."""
        values = asdict(self)
        if not method.has_strength:
            values["strengths"] = None
        if not method.by_steps:
            values |= {"learning_rates": None, "epochs": None, "early_stopping": False}
        choices = ("learning_rates", "strengths", "epochs", "early_stopping", "temperature")
        return values if any(values[name] for name in choices) else {}


def labels_of(labels: int | Mapping[str, int], task: str) -> int:
    """How many labels a method gets for a task."""
    return labels if isinstance(labels, int) else labels[task]


def check_labels(labels: Any, tasks: list[str], name: str) -> None:
    """Raises `BaraError` for `labels` that are neither a number nor one for each task."""
    given = labels.values() if isinstance(labels, dict) else [labels]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 1 for n in given):
        raise BaraError(f"benchmark {name}: labels must be a whole number above 1, or one per task")
    if isinstance(labels, dict):
        refuse_unknown(labels, tasks, f"benchmark {name}, labels")
        if missing := [task for task in tasks if task not in labels]:
            raise BaraError(f"benchmark {name}: labels has no number for the task {missing[0]}")
