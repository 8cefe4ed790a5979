"""Pictures of a benchmark, from the results file alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bara.bench.results import Row
from bara.bench.summary import METRICS, SETTING, Estimate, estimate, group, number
from bara.reports.style import LIGHT, Theme, series_styles, style_axes

Points = dict[float, Estimate]

COLUMNS = 4
"""Panels in a row."""

LABELS = {
    "train_size": ("low-data", "training examples"),
    "rank": ("rank", "maximum rank r"),
    "epochs": ("epochs", "epochs"),
}
"""The name and the axis of the curves along a setting."""


def figures(rows: Sequence[Row], baseline: str = "lora", theme: Theme = LIGHT) -> dict[str, Figure]:
    """Every picture that the rows have the numbers for, by name.

    A benchmark that varies nothing but tasks, methods and seeds gets pictures of its predictions
    and their cost; one that varies one thing more, curves along it.
    """
    varied = [name for name in SETTING[1:] if len({row[name] for row in rows}) > 1]
    if not varied:
        return _single(rows, baseline, theme)
    if len(varied) > 1:
        return {}
    shown = [m for m in ("nll", "s_bar") if any(number(row, m) is not None for row in rows)]
    return {
        f"{LABELS[varied[0]][0]}-{metric}": _curves(
            _against(rows, metric, varied[0]), theme, LABELS[varied[0]][1], metric, log=True
        )
        for metric in shown
    }


def _single(rows: Sequence[Row], baseline: str, theme: Theme) -> dict[str, Figure]:
    drawn: dict[str, Figure] = {}
    methods = group(rows, lambda row: row["name"])
    if any("reliability" in row for row in rows):
        drawn["reliability"] = _panels(methods, baseline, theme, _reliability)
    drawn["risk-coverage"] = _panels(methods, baseline, theme, _risk_coverage)
    return drawn | _shift(rows, theme) | _draws(rows, theme) | {"cost": _cost(rows, theme)}


def _draws(rows: Sequence[Row], theme: Theme) -> dict[str, Figure]:
    counts = sorted({int(count) for row in rows for count in row.get("by_draws", ())})
    if not counts:
        return {}
    metric = "spearman" if any(number(row, "spearman") is not None for row in rows) else "nll"
    places = {float(count): f"by_draws.{count}.{metric}" for count in counts}
    points = {
        task: {
            name: _points(of_name, places)
            for name, of_name in group(of_task, lambda row: row["name"]).items()
        }
        for task, of_task in group(rows, lambda row: row["task"]).items()
    }
    return {"draws": _curves(points, theme, "posterior draws", metric, log=True)}


def _against(rows: Sequence[Row], metric: str, setting: str) -> dict[str, dict[str, Points]]:
    """For each task and method, the metric at each value of a setting."""
    return {
        task: {
            name: {
                float(value): found
                for value, same in sorted(group(of_name, lambda row: row[setting]).items())
                if (found := estimate(same, metric)) is not None
            }
            for name, of_name in group(of_task, lambda row: row["name"]).items()
        }
        for task, of_task in group(rows, lambda row: row["task"]).items()
    }


def _points(rows: Sequence[Row], metrics: Mapping[float, str]) -> Points:
    """One method's estimates of several metrics, by their place on the axis."""
    found = {place: estimate(rows, metric) for place, metric in metrics.items()}
    return {place: value for place, value in found.items() if value is not None}


def _shift(rows: Sequence[Row], theme: Theme) -> dict[str, Figure]:
    shifts = sorted({shift for row in rows for shift in row.get("shift", {})})
    if not shifts:
        return {}
    metric = "nll"
    severities: dict[str, dict[float, str]] = {}
    for shift in shifts:
        kind, _, severity = shift.rpartition("-")
        severities.setdefault(kind, {})[float(severity)] = f"shift.{shift}.{metric}"
    methods = group(rows, lambda row: row["name"])
    points = {
        kind: {name: _points(own, places) for name, own in methods.items()}
        for kind, places in severities.items()
    }
    return {"shift": _curves(points, theme, "severity", metric)}


def _panels(
    methods: Mapping[str, Sequence[Row]],
    baseline: str,
    theme: Theme,
    draw: Callable[[Axes, Sequence[Row], dict[str, Any]], None],
) -> Figure:
    """A panel for each method, with the baseline in grey behind it."""
    figure, axes = _grid(len(methods), theme)
    for ax, (name, rows) in zip(axes, methods.items(), strict=False):
        if name != baseline and baseline in methods:
            draw(ax, methods[baseline], {"color": theme.muted, "lw": 1})
        draw(ax, rows, {"color": theme.series[1], "lw": 2})
        ax.set_title(name, fontsize=10, color=theme.ink, parse_math=False)
    return figure


def _reliability(ax: Axes, rows: Sequence[Row], style: dict[str, Any]) -> None:
    """Accuracy against confidence, the predictions of all rows together."""
    bins = [row["reliability"] for row in rows if "reliability" in row]
    if not bins:
        return
    count, accuracy, confidence = (
        np.array([b[name] for b in bins], dtype=float)
        for name in ("count", "accuracy", "confidence")
    )
    total = count.sum(0)
    used = total > 0
    x, y = (np.nansum(values * count, 0)[used] / total[used] for values in (confidence, accuracy))
    ax.plot((0, 1), (0, 1), color=style["color"], lw=0.5, ls=":")
    ax.plot(x, y, **style)
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")


def _risk_coverage(ax: Axes, rows: Sequence[Row], style: dict[str, Any]) -> None:
    """The mean over rows of the error of the surest part of the inputs."""
    curves = [row["risk_coverage"] for row in rows if "risk_coverage" in row]
    if not curves:
        return
    coverage = np.linspace(0.05, 1, 50)
    risk = np.mean([np.interp(coverage, c["coverage"], c["risk"]) for c in curves], axis=0)
    ax.plot(coverage, risk, **style)
    ax.set(xlim=(0, 1), xlabel="share answered", ylabel="error")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _curves(
    panels: Mapping[str, Mapping[str, Points]],
    theme: Theme,
    label: str,
    metric: str,
    *,
    log: bool = False,
) -> Figure:
    """A panel for each task or kind of shift, a line with standard errors for each method."""
    figure, axes = _grid(len(panels), theme)
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    styles = dict(zip(names, series_styles(theme), strict=False))
    for ax, (panel, methods) in zip(axes, panels.items(), strict=False):
        for name, points in methods.items():
            if points:
                style = styles[name]
                ax.errorbar(
                    list(points),
                    [value.mean for value in points.values()],
                    [value.error for value in points.values()],
                    color=style["color"],
                    ls=style["line"],
                    marker=style["marker"],
                    ms=4,
                    label=name,
                )
        if log:
            ax.set_xscale("log")
            places = sorted({place for points in methods.values() for place in points})
            ax.set_xticks(places, [f"{place:g}" for place in places])
            ax.minorticks_off()
        ax.set(xlabel=label, ylabel=METRICS[metric].heading)
        ax.set_title(panel, fontsize=10, color=theme.ink, parse_math=False)
    _legend(figure, axes[0], theme)
    return figure


def _cost(rows: Sequence[Row], theme: Theme) -> Figure:
    """NLL against the seconds of training, a point for each method, a panel for each task."""
    tasks = group(rows, lambda row: row["task"])
    figure, axes = _grid(len(tasks), theme)
    names = list(dict.fromkeys(row["name"] for row in rows))
    styles = dict(zip(names, series_styles(theme), strict=False))
    for ax, (task, of_task) in zip(axes, tasks.items(), strict=False):
        for name, own in group(of_task, lambda row: row["name"]).items():
            score, cost = estimate(own, "nll"), estimate(own, "seconds_train")
            if score is not None and cost is not None:
                style = styles[name]
                ax.errorbar(
                    cost.mean,
                    score.mean,
                    score.error,
                    color=style["color"],
                    marker=style["marker"],
                    ls="",
                    label=name,
                )
        ax.set(xlabel="seconds of training", ylabel="NLL")
        ax.set_title(task, fontsize=10, color=theme.ink, parse_math=False)
    _legend(figure, axes[0], theme)
    return figure


def _grid(count: int, theme: Theme) -> tuple[Figure, list[Axes]]:
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = Figure(
        figsize=(1 + 2.6 * columns, 0.6 + 2.4 * rows), layout="constrained", facecolor=theme.surface
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[:count]:
        style_axes(ax, theme)
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes[:count]


def _legend(figure: Figure, ax: Axes, theme: Theme) -> None:
    handles, labels = ax.get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False
    )
    for text in legend.get_texts():
        text.set(color=theme.ink)
        text.set_parse_math(False)
