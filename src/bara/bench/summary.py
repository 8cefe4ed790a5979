"""Tables of a benchmark: mean ± standard error over seeds, and paired differences to a baseline.

Grouped by hand and not with pandas: a mean takes the seeds that have every task, and a difference
the tasks that both methods have, so that each number of a table is a pivot of its own, over a few
nested rows. In pandas that is no shorter, and far slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from statistics import fmean, stdev
from typing import Any

from bara.bench.results import Row

ALL_TASKS = "mean over tasks"
SETTING = ("task", "train_size", "rank", "epochs")


@dataclass(frozen=True)
class Metric:
    """A column: its heading, the number's format, and whether less of it is better."""

    heading: str
    form: str = "{:.3f}"
    less: bool | None = True


METRICS = {
    "accuracy": Metric("accuracy", less=False),
    "rmse": Metric("RMSE"),
    "mae": Metric("MAE"),
    "nll": Metric("NLL"),
    "ece": Metric("ECE"),
    "brier": Metric("Brier"),
    "aurc": Metric("AURC"),
    "coverage_90": Metric("90% coverage", less=None),
    "spearman": Metric("Spearman", less=False),
    "spearman_epistemic": Metric("Spearman, epistemic", less=False),
    "ood_auroc": Metric("OOD AUROC", less=False),
    "ood_fpr95": Metric("OOD FPR95"),
    "temperature.nll": Metric("NLL, scaled"),
    "temperature.ece": Metric("ECE, scaled"),
    "temperature.value": Metric("temperature", less=None),
    "deterministic.accuracy": Metric("accuracy, mean mode", less=False),
    "deterministic.rmse": Metric("RMSE, mean mode"),
    "deterministic.nll": Metric("NLL, mean mode"),
    "s_bar": Metric("s_bar", "{:.2f}", None),
    "rank_error_spearman": Metric("rank and error", "{:.2f}", None),
    "seconds_search": Metric("search s", "{:.0f}"),
    "seconds_train": Metric("train s", "{:.0f}"),
    "seconds_predict": Metric("predict s", "{:.0f}"),
    "peak_memory_mib": Metric("peak MiB", "{:.0f}"),
    "parameters": Metric("trained", "{:,.0f}", None),
}
"""The columns in their order. `temperature.*` are after scaling with a temperature fitted on the
held-out examples; `deterministic.*` use the posterior mean instead of draws."""

OVERVIEW = ("accuracy", "rmse", "nll", "ece", "ood_auroc", "spearman", "s_bar")
"""The columns that fit a terminal."""

NESTED = {"by_draws": ("spearman", "nll"), "shift": ("nll",), "transfer": ("accuracy", "nll")}
"""The metrics shown of what is measured several times in a cell."""


def metric_groups(rows: Sequence[Row]) -> dict[str, dict[str, Metric]]:
    """The columns that the rows have numbers for, by the table that they belong to."""
    names = list(METRICS)
    scaled, cost = names.index("temperature.nll"), names.index("s_bar")
    groups = {
        "predictions": dict(list(METRICS.items())[:scaled]),
        "temperature and mean mode": dict(list(METRICS.items())[scaled:cost]),
        "rank and cost": dict(list(METRICS.items())[cost:]),
    }
    for nested, metrics in NESTED.items():
        keys = dict.fromkeys(key for row in rows for key in row.get(nested, ()))
        groups[nested.replace("_", " ")] = {
            f"{nested}.{key}.{metric}": replace(
                METRICS[metric], heading=f"{METRICS[metric].heading}, {key}"
            )
            for metric in metrics
            for key in keys
        }
    return {
        title: present
        for title, metrics in groups.items()
        if (present := {m: v for m, v in metrics.items() if _has(rows, m)})
    }


def _has(rows: Iterable[Row], metric: str) -> bool:
    return any(number(row, metric) is not None for row in rows)


@dataclass(frozen=True)
class Table:
    """A table of texts; the first columns are names."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    def to_markdown(self) -> str:
        """The table, with its title above."""
        lines = [f"**{self.title}**", "", *map(_line, [self.headings])]
        lines += ["|---" * len(self.headings) + "|", *map(_line, self.rows)]
        return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error (0 for a single seed)."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Mean and standard error, sd / sqrt(n) with n - 1 in the sd."""
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return cls(fmean(values), error, len(values))


def number(row: Row, metric: str) -> float | None:
    """A number of a row; `shift.typo-1.nll` is nested. What stands in the middle, such as the name
    of a task, may have dots of its own."""
    value: Any = row
    first, *middle = metric.split(".")
    name, last = ".".join(middle[:-1]), middle[-1:]
    for part in (first, *([name] if name else []), *last):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def by_seed(rows: Iterable[Row], metric: str) -> dict[int, float]:
    """A metric of one method for each seed, as the mean over tasks.

    A seed that lacks one of the tasks is left out, so that all seeds mean the same.
    """
    values: dict[int, dict[str, float]] = {}
    for row in rows:
        if (value := number(row, metric)) is not None:
            values.setdefault(row["seed"], {})[row["task"]] = value
    tasks = {task for of_seed in values.values() for task in of_seed}
    return {
        seed: fmean(of_seed.values())
        for seed, of_seed in sorted(values.items())
        if of_seed.keys() == tasks
    }


def estimate(rows: Iterable[Row], metric: str) -> Estimate | None:
    """Mean and standard error over seeds; None without a value."""
    values = by_seed(rows, metric)
    return Estimate.of(list(values.values())) if values else None


def paired_difference(rows: Iterable[Row], baseline: Iterable[Row], metric: str) -> Estimate | None:
    """Mean and standard error over seeds of the difference to the baseline on the same seed and
    the same tasks; None without a seed in common."""
    rows, baseline = list(rows), list(baseline)
    tasks = {row["task"] for row in rows} & {row["task"] for row in baseline}
    ours = by_seed([row for row in rows if row["task"] in tasks], metric)
    theirs = by_seed([row for row in baseline if row["task"] in tasks], metric)
    differences = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    return Estimate.of(differences) if differences else None


def group(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a key, keys in the order of their first row."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def tables(rows: Sequence[Row], title: str, baseline: str = "lora") -> list[Table]:
    """The means of every method in every setting, and their differences to the baseline."""
    result = []
    for part, metrics in metric_groups(rows).items():
        result.append(mean_table(rows, f"{title}, {part}: mean ± standard error", metrics))
        compared = {name: metric for name, metric in metrics.items() if metric.less is not None}
        of_part = f"{title}, {part}: difference to {baseline}, paired by seed"
        result.append(difference_table(rows, of_part, compared, baseline))
    return [table for table in result if table.rows]


def overview(rows: Sequence[Row], title: str) -> Table:
    """The most important means, in a table that fits a terminal."""
    shown = {name: METRICS[name] for name in OVERVIEW if _has(rows, name)}
    return mean_table(rows, f"{title}: mean ± standard error", shown)


def mean_table(rows: Sequence[Row], title: str, metrics: Mapping[str, Metric]) -> Table:
    """Mean ± standard error over seeds, a row for each method in each setting."""

    def cells(name: str, methods: Mapping[str, list[Row]]) -> list[Estimate | None]:
        return [estimate(methods[name], metric) for metric in metrics]

    return _table(rows, title, metrics, cells, signed=False)


def difference_table(
    rows: Sequence[Row], title: str, metrics: Mapping[str, Metric], baseline: str
) -> Table:
    """`paired_difference` to the baseline, a row for each other method in each setting."""

    def cells(name: str, methods: Mapping[str, list[Row]]) -> list[Estimate | None]:
        if name == baseline:
            return []
        theirs = methods.get(baseline, [])
        return [paired_difference(methods[name], theirs, metric) for metric in metrics]

    return _table(rows, title, metrics, cells, signed=True)


def _table(
    rows: Sequence[Row],
    title: str,
    metrics: Mapping[str, Metric],
    cells: Callable[[str, Mapping[str, list[Row]]], list[Estimate | None]],
    *,
    signed: bool,
) -> Table:
    varied = [name for name in SETTING if name == "task" or len({row[name] for row in rows}) > 1]
    lines = []
    for setting, in_setting in _settings(rows).items():
        shown = dict(zip(SETTING, setting, strict=True))
        label = [str(shown[name]) for name in varied]
        methods = group(in_setting, lambda row: row["name"])
        for name in methods:
            estimates = cells(name, methods)
            count = max((e.count for e in estimates if e), default=0)
            if count:
                numbers = map(_cell, estimates, metrics.values(), repeat(signed))
                lines.append([*label, name, str(count), *numbers])
    headings = [*varied, "method", "seeds", *(metric.heading for metric in metrics.values())]
    return Table(title, headings, lines)


def _settings(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by task and setting; several tasks of one kind have their means first."""
    settings = group(rows, lambda row: tuple(row[name] for name in SETTING))
    kinds = {"accuracy" in row for row in rows}
    if len({row["task"] for row in rows}) > 1 and len(kinds) == 1:
        overall = group(rows, lambda row: (ALL_TASKS, *(row[name] for name in SETTING[1:])))
        return {setting: _complete(of_it) for setting, of_it in overall.items()} | settings
    return settings


def _complete(rows: Sequence[Row]) -> list[Row]:
    """The seeds of a method that have every task: means over other tasks are no comparison."""
    tasks = {row["task"] for row in rows}
    runs = group(rows, lambda row: (row["name"], row["seed"]))
    return [row for run in runs.values() if {r["task"] for r in run} == tasks for row in run]


def _cell(value: Estimate | None, metric: Metric, signed: bool) -> str:
    if value is None:
        return "–"
    form = metric.form.replace("{:", "{:+") if signed else metric.form
    text = form.format(value.mean)
    return text if value.count == 1 else f"{text} ± {metric.form.format(value.error)}"
