"""What a benchmark is: a YAML file that expands into independent cells with stable keys."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from bara.bench.protocol import Select, check_labels, labels_of
from bara.bench.tasks import check_task, task_version
from bara.errors import BaraError
from bara.methods.recipe import BY_STEPS, METHOD_DEFAULTS, TrainRecipe, read_yaml
from bara.methods.table import check_recipe, parse_method
from bara.schema import MAX_DRAWS, SEEDS, refuse_unknown, shown

CORRUPTIONS = ("typo", "drop", "shuffle")
METHOD_FIELDS = {
    "name": str,
    "method": str,
    "method_options": dict,
    "training": dict,
    "select": bool,
}
FIXED = {"num_train_epochs": "set `epochs`", "save_strategy": "no", "eval_strategy": "no"}
"""Options of training that are the benchmark's, and what it does with them."""
LISTS = {
    "tasks": str,
    "seeds": int,
    "epochs": (int, float),
    "train_sizes": int,
    "ranks": int,
    "draws": int,
    "corruptions": str,
    "severities": int,
}
"""The fields that are lists, with the type of their items."""


MOST_CELLS = 10_000


@dataclass(frozen=True)
class Contender:
    """One contender.

    Attributes:
        name: what tables call it.
        method: the method's name in a `TrainRecipe`.
        method_options, training: as in a `TrainRecipe`; they go before the benchmark's.
        select: false for a method that chooses nothing, and trains on all of its labels at once.
    """

    name: str
    method: str
    method_options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    select: bool = True

    @classmethod
    def from_yaml(cls, value: Any) -> Contender:
        """A method from its name, or from a mapping of the fields.

        Raises:
            BaraError: it is neither, or a field is unknown or of another type.
        """
        if isinstance(value, str):
            return cls(value, value)
        if not isinstance(value, dict) or not {"name", "method"} <= value.keys():
            raise BaraError(
                f"methods: give a name, or a mapping with `name` and `method`, not {shown(value)}"
            )
        refuse_unknown(value, {option.name for option in fields(cls)}, "methods")
        for option, kind in METHOD_FIELDS.items():
            if not isinstance(value.get(option, kind()), kind):
                what = {str: "text", bool: "true or false"}.get(kind, "a mapping")
                raise BaraError(f"methods: {option} must be {what}, not {shown(value[option])}")
        return cls(**value)


@dataclass(frozen=True)
class Cell:
    """One training run and all that is measured of it.

    `key` is a hash of everything here that decides the result; `benchmark`, `name` (what the
    tables call the method) and `data` (where the files are) do not.
    """

    benchmark: str
    name: str
    data: str
    task: str
    task_version: str
    model: str
    method: str
    method_options: dict[str, Any]
    training: dict[str, Any]
    model_options: dict[str, Any]
    max_length: int
    seed: int
    epochs: float
    train_size: int
    rank: int
    num_validation: int
    num_test: int
    num_draws: int
    draws: tuple[int, ...]
    ood: tuple[str, ...]
    num_ood: int
    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    num_shift: int
    transfer: tuple[str, ...]
    select: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """16 hexadecimal digits."""
        others = ("benchmark", "name", "data", *(() if self.select else ("select",)))
        decides = {k: v for k, v in asdict(self).items() if k not in others}
        text = json.dumps(decides, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """The cell that `dataclasses.asdict` and JSON made `values` of."""
        tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**tuples)

    def __str__(self) -> str:
        return (
            f"{self.benchmark}: {self.name} on {self.task}, {self.train_size} examples, "
            f"r = {self.rank}, {self.epochs:g} epochs, seed {self.seed}"
        )


@dataclass
class Benchmark:
    """A grid of runs: every combination of tasks, methods, sizes, ranks, epochs and seeds.

    Attributes:
        name: the file's name by default.
        data: folder of the `file` tasks, relative to the YAML file.
        model: a folder, a hub name, or one of `bara.bench.models.MODELS`.
        model_options, max_length: as in a `TrainRecipe`.
        tasks: names of `bara.bench.tasks.TASKS`, `hub:NAME`, or folders in `data`.
        methods: names of methods, or mappings of `Contender`'s fields.
        method_options, training: for all methods, as in a `TrainRecipe`.
        seeds: of the choice of training examples, training and draws.
        epochs, train_sizes, ranks: each run with each; `lora_alpha` is twice the rank.
        num_validation: held-out examples, for temperatures and post-hoc methods.
        labels: all that a method gets, for every task or by task; in place of `train_sizes` and
            `num_validation`.
        select: what it may do with them, the fields of `bara.bench.protocol.Select`.
        num_test: at most this many test examples, the same for every seed.
        num_draws: posterior draws of the main metrics.
        draws: further numbers of draws to repeat the metrics at.
        ood: for a task, the tasks whose test inputs are out of its distribution.
        num_ood: at most this many of them, each.
        corruptions, severities: of test texts, see `bara.bench.corruptions`.
        num_shift: at most this many test texts for each corruption and severity.
        transfer: for a task, others with the same labels that its model is tested on.

    Raises:
        BaraError: a field is missing, or has the wrong type.
    """

    name: str
    model: str
    tasks: list[str]
    methods: list[Any]
    data: str = "."
    model_options: dict[str, Any] = field(default_factory=dict)
    max_length: int = 64
    method_options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    epochs: list[float] = field(default_factory=lambda: [20])
    train_sizes: list[int] = field(default_factory=lambda: [300])
    ranks: list[int] = field(default_factory=lambda: [8])
    num_validation: int = 300
    labels: Any = None
    select: dict[str, Any] = field(default_factory=dict)
    num_test: int = 600
    num_draws: int = 10
    draws: list[int] = field(default_factory=list)
    ood: dict[str, list[str]] = field(default_factory=dict)
    num_ood: int = 300
    corruptions: list[str] = field(default_factory=list)
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    num_shift: int = 300
    transfer: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in fields(self):
            self._check_type(option.name, str(option.type), getattr(self, option.name))
        for name in ("tasks", "methods", "seeds", "epochs", "train_sizes", "ranks"):
            if not getattr(self, name):
                raise BaraError(f"benchmark {self.name}: {name} is empty; give at least one")
        sizes = map(len, (self.tasks, self.methods, self.seeds, self.epochs, self.train_sizes))
        if (cells := math.prod(sizes) * len(self.ranks)) > MOST_CELLS:
            raise BaraError(f"benchmark {self.name}: {cells:,} cells are too many; list less")
        refuse_unknown(self.corruptions, CORRUPTIONS, "corruptions")
        if not all(1 <= severity <= 5 for severity in self.severities):
            raise BaraError(f"benchmark {self.name}: severities go from 1 to 5")
        for training in (self.training, *(method.training for method in self.contenders)):
            for fixed in FIXED.keys() & training.keys():
                why = FIXED[fixed]
                raise BaraError(f"benchmark {self.name}: training.{fixed} is not free ({why})")
        if self.labels is not None:
            check_labels(self.labels, self.tasks, self.name)
        elif self.select:
            raise BaraError(
                f"benchmark {self.name}: select is a choice on `labels`: give these too"
            )
        Select.from_yaml(self.select)
        if set("/\\") & set(self.name):  # it is part of the names of files
            raise BaraError(f"benchmark {self.name}: a name has no slashes")
        names = [method.name for method in self.contenders]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise BaraError(f"benchmark {self.name}: two methods are named {repeated[0]!r}")

    def _check_type(self, name: str, declared: str, value: Any) -> None:
        def wrong(what: str) -> BaraError:
            return BaraError(f"benchmark: {name} must be {what}, not {shown(value)}")

        if declared == "str" and not isinstance(value, str):
            raise wrong("text")
        if declared == "int" and (not isinstance(value, int) or isinstance(value, bool)):
            raise wrong("a whole number")
        if declared == "int" and value < (1 if name in ("num_test", "num_draws") else 0):
            raise wrong("larger")
        if declared.startswith("dict") and not isinstance(value, dict):
            raise wrong("a mapping")
        if declared == "dict[str, list[str]]" and not all(_strings(v) for v in value.values()):
            raise wrong("a mapping of tasks to lists of tasks")
        if declared.startswith("list") and not isinstance(value, list):
            raise wrong("a list")
        if name in LISTS and not all(
            isinstance(item, LISTS[name]) and not isinstance(item, bool)  # type: ignore[arg-type]
            for item in value
        ):
            raise wrong("a list of text" if LISTS[name] is str else "a list of numbers")
        if name in LISTS and len(set(value)) < len(value):
            raise wrong("a list without repetitions")
        if name in ("train_sizes", "ranks", "draws", "epochs") and not all(
            0 < v < math.inf for v in value
        ):
            raise wrong("a list of numbers above 0")
        if name == "seeds" and not all(0 <= seed < SEEDS for seed in value):
            raise wrong(f"a list of numbers from 0 on, below {SEEDS}")
        if name in ("num_draws", "draws") and max([0, *_list(value)]) > MAX_DRAWS:
            raise wrong(f"at most {MAX_DRAWS}")

    @property
    def contenders(self) -> list[Contender]:
        """The methods."""
        return [Contender.from_yaml(value) for value in self.methods]

    @classmethod
    def load(cls, path: str | Path) -> Benchmark:
        """Read a YAML file.

        Raises:
            BaraError: the file is missing, not YAML, or not a benchmark.
        """
        path = Path(path)
        values = read_yaml(path, "benchmark")
        if not isinstance(values, dict):
            raise BaraError(f"the benchmark {path} must be a mapping of options to values")
        refuse_unknown(values, {option.name for option in fields(cls)}, f"benchmark {path}")
        for name in ("model", "tasks", "methods"):
            if name not in values:
                raise BaraError(f"the benchmark {path} does not say which {name}")
        data = values.pop("data", ".")
        if not isinstance(data, str):
            raise BaraError(f"benchmark: data must be a folder, not {data!r}")
        for other in ("train_sizes", "num_validation"):
            if "labels" in values and other in values:
                raise BaraError(
                    f"the benchmark {path}: labels are all there are; leave out {other}"
                )
        folder = path.parent / data
        return cls(**{"name": path.stem, **values, "data": str(folder)})

    def check(self) -> None:
        """Check the tasks, the methods and the names of all options.

        Raises:
            BaraError: one of them is unknown; the message has the nearest that is known.
        """
        refuse_unknown({**self.ood, **self.transfer}, self.tasks, f"benchmark {self.name}")
        for task in {*self.tasks, *_all(self.ood), *_all(self.transfer)}:
            check_task(task, self.data)
        for cell in self.cells():
            check_recipe(recipe_of(cell, "unused"))
            if self.labels is not None and parse_method(cell.method)[1]:
                raise BaraError(
                    f"benchmark {self.name}: {cell.method} asks for labels besides `labels`; set "
                    "select.temperature"
                )

    def cells(self) -> Iterator[Cell]:
        """The cells, all methods of one setting before the next setting."""
        versions = {task: task_version(task, self.data) for task in self.tasks}
        select = Select.from_yaml(self.select)
        settings = (
            (seed, task, *others)
            for seed, task in product(self.seeds, self.tasks)
            for others in product(self._sizes(task), self.ranks, self.epochs, self.contenders)
        )
        for seed, task, train_size, rank, epochs, method in settings:
            chooses = self.labels is not None and method.select
            options = {"r": rank, "lora_alpha": 2 * rank}
            yield Cell(
                benchmark=self.name,
                name=method.name,
                data=self.data,
                task=task,
                task_version=versions[task],
                model=self.model,
                method=method.method,
                method_options={**options, **self.method_options, **method.method_options},
                training={**self.training, **method.training},
                model_options=self.model_options,
                max_length=self.max_length,
                seed=seed,
                epochs=float(epochs),
                train_size=train_size,
                rank=rank,
                num_validation=0 if self.labels is not None else self.num_validation,
                num_test=self.num_test,
                num_draws=self.num_draws,
                draws=tuple(self.draws),
                ood=tuple(self.ood.get(task, ())),
                num_ood=self.num_ood,
                corruptions=tuple(self.corruptions),
                severities=tuple(self.severities),
                num_shift=self.num_shift,
                transfer=tuple(self.transfer.get(task, ())),
                select=select.for_method(parse_method(method.method)[0]) if chooses else {},
            )

    def _sizes(self, task: str) -> list[int]:
        """Numbers of training examples to try for a task."""
        return self.train_sizes if self.labels is None else [labels_of(self.labels, task)]


def recipe_of(cell: Cell, output: str | Path, task: str | None = None) -> TrainRecipe:
    """How `finetune` trains a cell; the model is still the benchmark's name."""
    method, _ = parse_method(cell.method)
    training = {"num_train_epochs": cell.epochs, **cell.training}
    if not method.by_steps:
        training = {k: v for k, v in training.items() if k not in BY_STEPS}
    given = cell.method_options.items()  # every method gets the benchmark's rank; some have none
    options = {k: v for k, v in given if k not in METHOD_DEFAULTS or method.knows(k)}
    return TrainRecipe(
        model=cell.model,
        output=str(output),
        task=task,
        method=cell.method,
        method_options=options,
        model_options=cell.model_options,
        training=training,
        max_length=cell.max_length,
        seed=cell.seed,
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _all(lists: Mapping[str, Sequence[str]]) -> list[str]:
    return [name for names in lists.values() for name in names]
