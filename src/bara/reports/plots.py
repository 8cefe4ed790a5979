"""Pictures of calibration and of the effective rank, as matplotlib figures.

Each function takes a `Theme`, returns a `matplotlib.figure.Figure` and touches no global state of
matplotlib, so that they can be used beside a notebook's own figures and from several threads.
Methods keep their colour and line style, by their order in the mapping, from picture to picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from bara.errors import BaraError
from bara.evaluation.metrics import Evaluation, reliability, selective_risk
from bara.prediction.predictive import ClassificationPredictive, RegressionPredictive
from bara.reports.style import LIGHT, Theme, series_styles, style_axes

if TYPE_CHECKING:
    from bara.ranks.effective_rank import EffectiveRank


def reliability_diagram(evaluations: Mapping[str, Evaluation], theme: Theme = LIGHT) -> Figure:
    """What was promised against what happened; on the diagonal they agree.

    Classification: accuracy against confidence, in 15 bins, the area of a point growing with the
    share of predictions in its bin; below, that share. Regression: the share of targets inside
    the central intervals against the intervals' nominal probability.

    Args:
        evaluations: labelled evaluations by name, all of the same kind.

    Raises:
        BaraError: no evaluations, both kinds, or no labels.
    """
    if _is_classification(evaluations):
        return _classification_reliability(evaluations, theme)
    return _interval_coverage(evaluations, theme)


def risk_coverage(evaluations: Mapping[str, Evaluation], theme: Theme = LIGHT) -> Figure:
    """Error rate (regression: root mean squared error) of the share of inputs answered, when the
    most uncertain are left out first.

    Raises:
        BaraError: as `reliability_diagram`.
    """
    classification = _is_classification(evaluations)
    figure, axes = _figure(theme)
    top = 0.0
    for style, (name, evaluation) in zip(series_styles(theme), evaluations.items(), strict=False):
        coverage, risk = selective_risk(evaluation.predictive)
        risk = risk if classification else risk.sqrt()
        label = f"{name} (area {evaluation.metrics['aurc']:.3f})" if classification else name
        # The risk of the first few answers is all or nothing, and would set the scale.
        shown = coverage >= 0.02
        axes.plot(
            coverage[shown], risk[shown], style["line"], color=style["color"], lw=2, label=label
        )
        top = max(top, risk[shown].max().item())
    axes.set(xlim=(0, 1), ylim=(0, 1.05 * top or 1))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if classification:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("share of inputs answered, surest first")
    axes.set_ylabel("wrong among them" if classification else "root mean squared error")
    _legend(figure, axes, theme, "Errors when the unsure are left out")
    return figure


def effective_rank_heatmap(rank: EffectiveRank, theme: Theme = LIGHT) -> Figure:
    """Mean effective rank of each adapted layer: position in the network × type of module."""
    columns, rows, matrix = _layer_matrix(rank)
    largest = max(rank.max_rank)
    figure, axes = _figure(theme, height=max(2.3, min(1.5 + 0.36 * len(rows), 7.5)))
    colours = LinearSegmentedColormap.from_list("rank", theme.ramp)
    image = axes.imshow(matrix, cmap=colours, vmin=0, vmax=largest, aspect="auto")
    every = -(-len(columns) // 16)
    axes.set_xticks(range(0, len(columns), every), columns[::every])
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.set_xticks([c - 0.5 for c in range(1, len(columns))], minor=True)
    axes.set_yticks([r - 0.5 for r in range(1, len(rows))], minor=True)
    axes.grid(False)
    axes.grid(which="minor", color=theme.surface, lw=2 if len(columns) <= 16 else 0.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if len(columns) <= 12:
        for row, values in enumerate(matrix.tolist()):
            for column, value in enumerate(values):
                if value == value:  # not NaN: there is such a layer
                    _cell_text(axes, column, row, value, colours(value / largest))
    axes.set_xlabel("layer of the network")
    _title(figure, theme, "Effective rank of each layer")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.locator = MaxNLocator(4, integer=True)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=9, colors=theme.muted)
    return figure


def effective_rank_histogram(rank: EffectiveRank, theme: Theme = LIGHT) -> Figure:
    """Effective rank of each input, mean over layers, and the mean over all (``s_bar``)."""
    figure, axes = _figure(theme)
    values = rank.per_input.double()
    low, high = values.min().item(), values.max().item()
    if high - low < 1e-3:  # rounding only: one bar, not a histogram of noise
        low, high = low - 0.5, high + 0.5
    axes.hist(
        values.numpy(),
        bins=min(25, max(7, round(len(values) ** 0.5))) | 1,
        range=(low, high),
        color=theme.series[1],
        edgecolor=theme.surface,
        lw=1,
    )
    axes.axvline(rank.s_bar, color=theme.ink, lw=1.5, ls="--")
    largest = sum(rank.max_rank) / len(rank.max_rank)
    axes.annotate(
        f"mean {rank.s_bar:.2f} of {largest:g}",
        (rank.s_bar, 1),
        xycoords=("data", "axes fraction"),
        xytext=(6, -4),
        textcoords="offset points",
        va="top",
        color=theme.ink,
        bbox={"facecolor": theme.surface, "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
    )
    axes.margins(y=0.14)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("effective rank, mean over layers")
    axes.set_ylabel("number of inputs")
    _title(figure, theme, "Effective rank of each input")
    return figure


def effective_rank_shift(ranks: Mapping[str, EffectiveRank], theme: Theme = LIGHT) -> Figure:
    """Effective rank of each input, mean over layers, in several data sets by name."""
    figure, axes = _figure(theme)
    values = [rank.per_input.double() for rank in ranks.values()]
    low = min(v.min().item() for v in values)
    high = max(v.max().item() for v in values)
    edges = torch.linspace(low - 1e-3, high + 1e-3, 26)
    for style, (name, rank), value in zip(
        series_styles(theme), ranks.items(), values, strict=False
    ):
        counts, _ = torch.histogram(value.float(), edges)
        label = f"{name} (mean {rank.s_bar:.2f})"
        look = {"color": style["color"], "ls": style["line"], "lw": 2}
        axes.stairs(counts / counts.sum(), edges, label=label, **look)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("effective rank, mean over layers")
    axes.set_ylabel("share of inputs")
    _legend(figure, axes, theme, "Effective rank in two data sets")
    return figure


def error_by_rank(rank: Tensor, error: Tensor, theme: Theme = LIGHT) -> Figure:
    """Mean error of the inputs with low to high effective rank, in up to five equal groups.

    Args:
        rank: effective rank of each input, (n,).
        error: of each input: 1 for a wrong class and 0 for the right one, or absolute errors, (n,).
    """
    figure, axes = _figure(theme)
    groups = [part for part in rank.argsort().tensor_split(min(5, len(rank))) if len(part)]
    ranks = [rank[part].mean().item() for part in groups]
    errors = [error[part].double() for part in groups]
    means = [e.mean().item() for e in errors]
    # the bars are standard errors; one input has none
    spread = [e.std().item() / len(e) ** 0.5 if len(e) > 1 else 0.0 for e in errors]
    axes.errorbar(ranks, means, spread, fmt="o-", color=theme.series[1], capsize=3, lw=1.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("effective rank, mean over layers")
    axes.set_ylabel("mean error, with standard error")
    _title(figure, theme, "Rank and error")
    return figure


def _classification_reliability(evaluations: Mapping[str, Evaluation], theme: Theme) -> Figure:
    figure, (axes, strip) = _figure(theme, height=4.3, rows=(3.6, 1))
    axes.plot((0, 1), (0, 1), color=theme.muted, lw=1, ls=(0, (2, 2)), zorder=1)
    for style, (name, evaluation) in zip(series_styles(theme), evaluations.items(), strict=False):
        predictive = evaluation.predictive
        assert isinstance(predictive, ClassificationPredictive)
        confidence, accuracy, size = reliability(predictive.probs, _labels_of(evaluation))
        used, share = size > 0, size / size.sum()
        label = f"{name} (ECE {evaluation.metrics['ece']:.3f})"
        axes.plot(confidence[used], accuracy[used], style["line"], color=style["color"], alpha=0.6)
        axes.scatter(
            confidence[used],
            accuracy[used],
            s=10 + 240 * share[used],
            marker=style["marker"],
            color=style["color"],
            edgecolor=theme.surface,
            lw=0.8,
            zorder=3,
        )
        axes.plot([], [], style["line"], marker=style["marker"], color=style["color"], label=label)
        strip.stairs(
            share, torch.linspace(0, 1, len(share) + 1), color=style["color"], ls=style["line"]
        )
    axes.set(ylim=(0, 1.02), xlim=(0, 1.02))
    strip.set(xlim=(0, 1.02))
    axes.tick_params(labelbottom=False)
    for axis in (axes.yaxis, strip.xaxis, strip.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    strip.yaxis.set_major_locator(MaxNLocator(2))
    strip.set_xlabel("confidence: how sure the model says it is")
    strip.set_ylabel("share")
    axes.set_ylabel("how often it is right")
    _legend(figure, axes, theme, "Confidence and accuracy")
    return figure


def _interval_coverage(evaluations: Mapping[str, Evaluation], theme: Theme) -> Figure:
    figure, axes = _figure(theme)
    axes.plot((0, 1), (0, 1), color=theme.muted, lw=1, ls=(0, (2, 2)), zorder=1)
    levels = torch.linspace(0, 1, 51, dtype=torch.float64)
    for style, (name, evaluation) in zip(series_styles(theme), evaluations.items(), strict=False):
        predictive = evaluation.predictive
        assert isinstance(predictive, RegressionPredictive)
        # A target lies inside the central interval of probability p iff |2 F(y) - 1| <= p.
        needed = (2 * predictive.cdf(_labels_of(evaluation)) - 1).abs()
        covered = (needed[:, None] <= levels).double().mean(0)
        label = f"{name} (90%: {evaluation.metrics['coverage_90']:.0%})"
        axes.plot(levels, covered, style["line"], color=style["color"], lw=2, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("probability the interval should have")
    axes.set_ylabel("targets inside it")
    _legend(figure, axes, theme, "Promised and observed coverage")
    return figure


def _is_classification(evaluations: Mapping[str, Evaluation]) -> bool:
    kinds = {type(evaluation.predictive) for evaluation in evaluations.values()}
    if len(kinds) != 1:
        raise BaraError("a picture needs evaluations that are all classification or all regression")
    return kinds == {ClassificationPredictive}


def _labels_of(evaluation: Evaluation) -> Tensor:
    if evaluation.predictive.labels is None:
        raise BaraError("a calibration picture needs predictions that carry their labels")
    return evaluation.predictive.labels


def layer_grid(
    layers: Sequence[str],
) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Columns (the first number in each layer's name), rows (the rest of it, shortened: the types
    of module), and the row and column of each layer."""
    places: list[tuple[int, tuple[str, ...]]] = []
    for name in layers:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        # Layers outside the numbered stack, such as a head, get the column -1.
        index = -1 if at is None else int(parts[at])
        places.append((index, tuple(p for i, p in enumerate(parts) if i != at)))
    types = list(dict.fromkeys(kind for _, kind in places))
    indices = sorted({index for index, _ in places}, key=lambda i: (i < 0, i))
    columns = [str(index) if index >= 0 else "–" for index in indices]
    positions = [(types.index(kind), indices.index(index)) for index, kind in places]
    return columns, [_short_name(kind, types) for kind in types], positions


def _layer_matrix(rank: EffectiveRank) -> tuple[list[str], list[str], Tensor]:
    """Columns and rows of `layer_grid`, and the mean ranks, NaN where there is no such layer."""
    columns, rows, positions = layer_grid(rank.layers)
    matrix = torch.full((len(rows), len(columns)), float("nan"))
    for position, value in zip(positions, rank.per_layer.tolist(), strict=True):
        matrix[position] = value
    return columns, rows, matrix


def _short_name(parts: tuple[str, ...], types: list[tuple[str, ...]]) -> str:
    """The shortest end of the name that no other type of module shares."""
    lengths = (k for k in count(1) if sum(t[-k:] == parts[-k:] for t in types) == 1)
    return ".".join(parts[-next(lengths) :])


def _cell_text(
    axes: Axes, column: int, row: int, value: float, background: tuple[float, ...]
) -> None:
    red, green, blue, *_ = background
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
    axes.text(
        column,
        row,
        f"{value:.1f}",
        ha="center",
        va="center",
        fontsize=9,
        color=LIGHT.ink if light else "white",
    )


def _figure(theme: Theme, height: float = 3.5, rows: tuple[float, ...] | None = None) -> Any:
    """A figure 4.9 inches wide, with one axes or (``rows``: their heights) several."""
    figure = Figure(figsize=(4.9, height), layout="constrained", facecolor=theme.surface)
    axes = figure.subplots(len(rows or "1"), height_ratios=rows, sharex=True, squeeze=False)[:, 0]
    for ax in axes:
        style_axes(ax, theme)
    return figure, (axes if rows else axes[0])


def _title(figure: Figure, theme: Theme, text: str) -> None:
    figure.suptitle(text, x=0.02, ha="left", fontsize=11.5, fontweight="bold", color=theme.ink)


def _legend(figure: Figure, axes: Axes, theme: Theme, title: str) -> None:
    """Title and legend above the axes, where they hide nothing."""
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=2,
        fontsize=9.5,
        labelcolor=theme.ink,
        frameon=False,
        borderaxespad=0.2,
        title=title,
        title_fontproperties={"size": 11.5, "weight": "bold"},
        alignment="left",
    )
    legend.get_title().set_color(theme.ink)
    for text in legend.get_texts():
        text.set_parse_math(False)
