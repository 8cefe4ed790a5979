"""A report in one HTML file, for a reader who knows nothing of Bayesian methods."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from torch import Tensor

from bara.evaluation.metrics import Evaluation, selective_risk
from bara.files import atomic_write_text
from bara.prediction.predictive import ClassificationPredictive
from bara.reports import plots
from bara.reports.style import DARK, LIGHT, to_png

if TYPE_CHECKING:
    from bara.ranks.effective_rank import EffectiveRank


@dataclass(frozen=True)
class Column:
    """How a key of the table's rows is shown: heading, number format, meaning, better end."""

    heading: str
    form: str
    meaning: str
    best: Callable[[list[float]], float] | None = None


COLUMNS = {
    "method": Column("method", "{}", ""),
    "accuracy": Column("accuracy", "{:.1%}", "how often the model is right.", max),
    "rmse": Column("RMSE", "{:.4g}", "size of a typical error, large ones counting more.", min),
    "mae": Column("MAE", "{:.4g}", "mean size of an error.", min),
    "nll": Column(
        "NLL",
        "{:.3f}",
        "how surprised the model is by the true answers; being sure and wrong costs most.",
        min,
    ),
    "ece": Column("ECE", "{:.3f}", "mean gap between how sure it is and how often right.", min),
    "brier": Column("Brier", "{:.3f}", "squared distance of its probabilities to the truth.", min),
    "aurc": Column(
        "AURC", "{:.3f}", "mean error when the most uncertain cases are left out first.", min
    ),
    "coverage_90": Column(
        "90% coverage", "{:.1%}", "how often the truth lies in its 90% interval; 90% is ideal."
    ),
    "spearman": Column(
        "Spearman", "{:.2f}", "whether larger uncertainty goes with larger errors.", max
    ),
    "ood_auroc": Column(
        "OOD AUROC",
        "{:.3f}",
        "how well uncertainty tells texts of another kind from the model's own; 0.5 is chance.",
        max,
    ),
    "ood_fpr95": Column(
        "OOD FPR95",
        "{:.1%}",
        "false alarms when 95% of the texts of another kind are to be found.",
        min,
    ),
    "s_bar": Column(
        "effective rank",
        "{:.2f}",
        "mean number of directions, per layer and input, the adapter really uses.",
    ),
    "r": Column("rank r", "{}", "number of directions it has."),
    "trainable_parameters": Column("trainable", "{:,}", "number of trained parameters."),
    "seconds": Column("seconds", "{:.0f}", "time for training and evaluation."),
}


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    table: Sequence[Mapping[str, Any]],
    evaluations: Mapping[str, Evaluation],
    rank: EffectiveRank | None = None,
    examples: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write one self-contained HTML file: pictures and style inside, nothing loaded from outside.

    Args:
        path: the file; written whole or not at all.
        title: heading of the page.
        table: a row per method. The keys of `COLUMNS` are shown with their meaning and the best
            value in bold, other keys as they are; a missing value or None as a dash.
        evaluations: labelled evaluations by name, in the order of their colours; all
            classification or all regression. Empty: no calibration pictures.
        rank: effective ranks of the adaptive method.
        examples: heading → texts, each a dict of ``text``, ``prediction``, ``label`` (or None),
            ``confidence`` (probability of the prediction) and ``uncertainty`` (nats).
        notes: sentences on data, budget and seeds.

    Raises:
        BaraError: evaluations of two kinds or without labels, or the file cannot be written.
    """
    classification = all(
        isinstance(evaluation.predictive, ClassificationPredictive)
        for evaluation in evaluations.values()
    )
    page = render_page(
        "report.html.j2",
        title=title,
        classification=classification,
        table=_table(table),
        reliability=picture(plots.reliability_diagram, evaluations) if evaluations else None,
        risk_coverage=picture(plots.risk_coverage, evaluations) if evaluations else None,
        calibration=_calibration_sentences(evaluations),
        selection=_selection_sentences(evaluations),
        heatmap=picture(plots.effective_rank_heatmap, rank) if rank else None,
        histogram=picture(plots.effective_rank_histogram, rank) if rank else None,
        rank=rank_numbers(rank) if rank else None,
        examples=examples or {},
        notes=notes,
    )
    atomic_write_text(path, page)


def render_page(template: str, **values: Any) -> str:
    """A page of `templates/`, with every value escaped."""
    environment = Environment(
        loader=PackageLoader("bara.reports"),
        # Not `select_autoescape`: it goes by the name's end, and `.html.j2` is not `.html`.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def picture(draw: Callable[..., Figure], *subjects: Any) -> dict[str, str]:
    """The picture in both modes, as data URIs."""
    return {
        mode: "data:image/png;base64," + base64.b64encode(to_png(draw(*subjects, theme))).decode()
        for mode, theme in (("light", LIGHT), ("dark", DARK))
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    present = dict.fromkeys(key for row in rows for key in row)
    keys = [key for key in COLUMNS if key in present]
    keys += [key for key in present if key not in COLUMNS]
    if "s_bar" in keys and "r" in keys:
        keys.remove("r")  # shown beside the effective rank
    best = {key: _best_cell(key, rows) for key in keys}
    return {
        "headings": [COLUMNS[key].heading if key in COLUMNS else key for key in keys],
        "rows": [
            [
                {
                    "text": (text := _cell(key, row)),
                    "best": text == best[key],
                    "number": not isinstance(row.get(key), str),
                }
                for key in keys
            ]
            for row in rows
        ],
        "glossary": [COLUMNS[key] for key in keys if key in COLUMNS and COLUMNS[key].meaning],
    }


def _cell(key: str, row: Mapping[str, Any]) -> str:
    value = row.get(key)
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    form = COLUMNS[key].form if key in COLUMNS else "{:.4g}" if isinstance(value, float) else "{}"
    text = form.format(value)
    return f"{text} of {row['r']}" if key == "s_bar" and row.get("r") is not None else text


def _best_cell(key: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The text of the best value, so that a tie after rounding is shown as one."""
    values = [row[key] for row in rows if row.get(key) is not None]
    best = COLUMNS[key].best if key in COLUMNS else None
    if best is None or len(values) < 2:
        return None
    return _cell(key, {key: best(values)})


def _calibration_sentences(evaluations: Mapping[str, Evaluation]) -> list[str]:
    sentences = []
    for name, evaluation in evaluations.items():
        predictive, metrics = evaluation.predictive, evaluation.metrics
        if isinstance(predictive, ClassificationPredictive):
            confidence = predictive.probs.amax(-1).mean().item()
            sentences.append(
                f"{name} says it is {confidence:.0%} sure on average, "
                f"and is right {metrics['accuracy']:.0%} of the time."
            )
        else:
            sentences.append(
                f"The 90% intervals of {name} hold {metrics['coverage_90']:.0%} of the targets."
            )
    return sentences


def _selection_sentences(evaluations: Mapping[str, Evaluation]) -> list[str]:
    sentences = []
    for name, evaluation in evaluations.items():
        risk = selective_risk(evaluation.predictive)[1]
        half = risk[(len(risk) - 1) // 2].item()
        if isinstance(evaluation.predictive, ClassificationPredictive):
            sentences.append(
                f"{name} is wrong in {risk[-1].item():.0%} of all cases, "
                f"and in {half:.0%} of the half it is surest of."
            )
        else:
            sentences.append(
                f"{name} has a root mean squared error of {risk[-1].item() ** 0.5:.3g} on all "
                f"cases, and of {half**0.5:.3g} on the half it is surest of."
            )
    return sentences


def rank_numbers(rank: EffectiveRank) -> dict[str, str]:
    """The effective rank in the words of the page."""

    def extent(values: Tensor) -> str:
        return f"{values.min().item():.1f} to {values.max().item():.1f}"

    return {
        "mean": f"{rank.s_bar:.1f}",
        "max": f"{sum(rank.max_rank) / len(rank.max_rank):g}",
        "layers": extent(rank.per_layer),
        "inputs": extent(rank.per_input),
    }
