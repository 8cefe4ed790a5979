"""The picture of a search: what was tried, and how it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from bara.reports.style import LIGHT, Theme, style_axes

LOG = ("learning_rate", "strength")


@dataclass(frozen=True)
class Trial:
    """One choice that was tried.

    Attributes:
        number: Optuna's.
        choice: value by name.
        value: the metric; None unless it was finished.
        state: `finished`, `stopped` or `failed`.
        metrics: all that were measured.
        seconds: that it took.
        error: why it failed.
    """

    number: int
    choice: dict[str, float]
    value: float | None
    state: str
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""


def tuning_picture(
    trials: Sequence[Trial],
    best: Trial,
    metric: str,
    probe: float | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """The metric against each value that was chosen, with the probe's as a line.

    Trials that were stopped are ticks at the lower edge.

    Args:
        trials: all of them.
        best: is marked.
        metric: its name.
        probe: the probe's metric.
    """
    names = list(best.choice)
    figure = Figure(figsize=(3.4 * len(names), 3.2), facecolor=theme.surface, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    line, dots, *_ = theme.series
    for ax, name in zip(panels, names, strict=True):
        style_axes(ax, theme)
        finished = [trial for trial in trials if trial.value is not None]
        ax.scatter(
            [trial.choice[name] for trial in finished],
            [trial.value for trial in finished],
            color=dots,
            label="trials",
        )
        stopped = [t.choice[name] for t in trials if t.state == "stopped" and name in t.choice]
        ax.plot(
            stopped,
            [0.02] * len(stopped),
            "|",
            color=theme.muted,
            transform=ax.get_xaxis_transform(),
            label="stopped early",
        )
        ax.scatter([best.choice[name]], [best.value], marker="*", s=180, color=line, label="best")
        if probe is not None:
            ax.axhline(probe, color=theme.ink, ls="--", lw=1, label="probe")
        if name in LOG:
            ax.set_xscale("log")
        ax.set_xlabel(name.replace("_", " "))
    panels[0].set_ylabel(metric)
    panels[-1].legend(frameon=False, fontsize=8.5, labelcolor=theme.ink)
    return figure
