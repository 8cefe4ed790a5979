"""The effective rank as a folder of numbers, pictures and one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bara.evaluation.metrics import selection
from bara.files import atomic_directory
from bara.prediction.predictive import ClassificationPredictive, Predictive, RegressionPredictive
from bara.ranks.effective_rank import EffectiveRank, RankShift, rank_shift
from bara.reports import plots
from bara.reports.report import picture, rank_numbers, render_page
from bara.reports.style import save_figure

HEADINGS = ("module", "layers", "soft", "± draws", "hard", "lowest", "highest", "maximum")
EXAMPLES = 5


@dataclass(frozen=True)
class RankReport:
    """The effective rank of one model on one data set, and what it is compared with.

    Attributes:
        name: of the data set.
        rank: on it.
        texts: its n inputs, as a reader would see them.
        against: name of the other data set, and the rank on it.
        errors: of the n inputs, see `prediction_errors`; None without labels.
        frozen: whether rank 0 would do, see `against_frozen`; None where that is not known.
    """

    name: str
    rank: EffectiveRank
    texts: Sequence[str]
    against: tuple[str, EffectiveRank] | None = None
    errors: Tensor | None = None
    frozen: str | None = None

    @property
    def shift(self) -> RankShift | None:
        """Of the other data set against this one."""
        return None if self.against is None else rank_shift(self.rank, self.against[1])

    @property
    def spearman(self) -> float | None:
        """Rank correlation of effective rank and error; None without labels, 0 if either is
        constant."""
        if self.errors is None or len(self.errors) < 2:
            return None
        from torchmetrics.functional import spearman_corrcoef

        value = spearman_corrcoef(self.rank.per_input.double(), self.errors.double())
        return float(value.nan_to_num(0.0))

    def modules(self) -> list[dict[str, Any]]:
        """A row for each type of module, with the keys `HEADINGS`."""
        rank = self.rank
        _, kinds, positions = plots.layer_grid(rank.layers)
        rows = []
        for number, kind in enumerate(kinds):
            mine = torch.tensor([i for i, (row, _) in enumerate(positions) if row == number])
            layers = rank.per_layer[mine]
            spread = None
            if rank.draws is not None and len(rank.draws) > 1:
                spread = float(rank.draws[:, mine].mean(dim=(1, 2)).std())
            maximum = sum(rank.max_rank[i] for i in mine.tolist()) / len(mine)
            middle = (layers.mean(), spread, rank.hard[mine].mean())
            values = (kind, len(mine), *middle, layers.min(), layers.max(), maximum)
            rows.append(dict(zip(HEADINGS, map(_plain, values), strict=True)))
        return rows

    def layers(self) -> list[dict[str, Any]]:
        """A row for each layer: its name, its maximum rank, and means over inputs."""
        rank, spread = self.rank, self.rank.per_layer_std
        return [
            {
                "name": name,
                "maximum": largest,
                "soft": float(rank.soft[i].mean()),
                "hard": float(rank.hard[i].mean()),
                "std": None if spread is None else float(spread[i]),
            }
            for i, (name, largest) in enumerate(zip(rank.layers, rank.max_rank, strict=True))
        ]

    def shift_sentence(self) -> str | None:
        """The shift in words."""
        if self.against is None or self.shift is None:
            return None
        shift = self.shift
        return (
            f"On {self.against[0]} the rank is {shift.mean:+.3f} ± {shift.standard_error:.3f} "
            f"(standard error over inputs) against {self.name}; a text of it has the higher rank "
            f"of two with probability {shift.auroc:.2f}."
        )

    def error_sentence(self) -> str | None:
        """The correlation with the error in words."""
        if self.spearman is None:
            return None
        return f"Spearman's correlation of effective rank and error is {self.spearman:+.2f}."

    def sentences(self) -> list[str]:
        """What there is to say of the rank."""
        return [s for s in (self.shift_sentence(), self.error_sentence(), self.frozen) if s]

    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """The inputs with the highest and the lowest rank."""
        order = self.rank.per_input.argsort(descending=True).tolist()

        def items(index: list[int]) -> list[dict[str, Any]]:
            ranks, spread = self.rank.per_input, self.rank.per_input_std
            return [
                {
                    "text": " ".join(self.texts[i].split()),
                    "rank": float(ranks[i]),
                    "std": None if spread is None else float(spread[i]),
                }
                for i in index
            ]

        return {
            "Highest rank": items(order[:EXAMPLES]),
            "Lowest rank": items(order[::-1][:EXAMPLES]),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rank, shift = self.rank, self.shift
        spread = rank.per_input_std
        return {
            "data": self.name,
            "s_bar": rank.s_bar,
            "s_bar_std": rank.s_bar_std,
            "layers": self.layers(),
            "modules": self.modules(),
            "per_input": {
                "soft": rank.per_input.tolist(),
                "hard": rank.hard.mean(dim=0).tolist(),
                "std": None if spread is None else spread.tolist(),
            },
            "shift": None
            if shift is None or self.against is None
            else {
                "data": self.against[0],
                "mean": shift.mean,
                "standard_error": shift.standard_error,
                "per_layer": shift.per_layer.tolist(),
                "auroc": shift.auroc,
            },
            "spearman": self.spearman,
            "frozen": self.frozen,
        }


def prediction_errors(predictive: Predictive) -> Tensor:
    """Each input's error, (n,): 1 for a wrong class and 0 for the right one, or |mean - target|."""
    assert predictive.labels is not None
    if isinstance(predictive, ClassificationPredictive):
        return (predictive.prediction != predictive.labels).double()
    if not isinstance(predictive, RegressionPredictive):
        return selection(predictive)[1]
    return (predictive.mean - predictive.labels).abs().double()


def write_rank_report(folder: str | Path, report: RankReport, notes: Sequence[str] = ()) -> None:
    """Writes `ranks.json`, the pictures and `report.html`, all of them or nothing.

    Raises:
        BaraError: the folder cannot be written.
    """
    rank = report.rank
    drawings: dict[str, tuple[Any, ...]] = {
        "layers": (plots.effective_rank_heatmap, rank),
        "inputs": (plots.effective_rank_histogram, rank),
    }
    if report.against is not None:
        ranks = {report.name: rank, report.against[0]: report.against[1]}
        drawings["shift"] = (plots.effective_rank_shift, ranks)
    if report.errors is not None:
        drawings["error"] = (plots.error_by_rank, rank.per_input, report.errors)
    page = render_page(
        "ranks.html.j2",
        title=f"Effective rank on {report.name}",
        rank=rank_numbers(rank),
        headings=HEADINGS,
        modules=[[cell(value) for value in row.values()] for row in report.modules()],
        layers=[[cell(value) for value in row.values()] for row in report.layers()],
        pictures={
            name: picture(*drawings[name]) if name in drawings else None
            for name in ("layers", "inputs", "shift", "error")
        },
        shift=[sentence for sentence in [report.shift_sentence()] if sentence],
        error=[sentence for sentence in [report.error_sentence()] if sentence],
        frozen=report.frozen,
        examples=report.examples(),
        notes=notes,
    )
    with atomic_directory(folder) as temporary:
        for name, (draw, *subjects) in drawings.items():
            save_figure(draw(*subjects), temporary / f"{name}.png")
        numbers = json.dumps(report.to_dict(), indent=2)
        (temporary / "ranks.json").write_text(numbers + "\n", "utf-8")
        (temporary / "report.html").write_text(page, "utf-8", errors="replace")


def cell(value: Any) -> str:
    """A value of the table as text."""
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value
