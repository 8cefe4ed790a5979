"""Choosing on a method's own labels: some are held back, and what is best on them is trained."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bara.bench.measure import metrics_of
from bara.bench.models import Fitted, fit
from bara.bench.spec import Cell
from bara.bench.tasks import Splits
from bara.data.text_task import split_dataset
from bara.prediction.temperature import fit_temperature, get_temperature, set_temperature
from bara.training.epochs import BestEpoch, StopAfter

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class _Candidate:
    """A cell without a search, what it was given, and how it did on the held-back labels."""

    cell: Cell
    given: dict[str, float]
    score: float = float("inf")
    stopped: tuple[float, ...] = ()

    def chosen(self) -> dict[str, float]:
        """What it was given, with the epochs that it was stopped after (mean over members)."""
        if not self.stopped:
            return self.given
        return {**self.given, "stopped_after": sum(self.stopped) / len(self.stopped)}


def fit_selected(cell: Cell, train: Dataset, folder: Path) -> tuple[Fitted, dict[str, Any]]:
    """Trains every candidate on a part of the labels, and what `cell.select` says of the best.

    Args:
        cell: with a `select`.
        train: all labels that there are.
        folder: where adapters go.

    Returns:
        The model, and what the row says of the search: `chosen`, `search` (each candidate with its
        loss on the held-back labels), `seconds_search`.

    Raises:
        BaraError: as `bara.bench.models.fit`.
    """
    start = time.perf_counter()
    select = cell.select
    rest, held_back = _held_back(train, select["held_back"], cell.seed)
    options: dict[str, Any] = {"num_draws": cell.num_draws, "seed": cell.seed}
    best, best_model = None, None
    tried = []
    for number, candidate in enumerate(_candidates(cell)):
        early = BestEpoch() if select["early_stopping"] else None
        model = fit(
            candidate.cell,
            Splits(rest, held_back, held_back if early else None),
            folder / f"candidate-{number}",
            callbacks=[early] if early else [],
            evaluate="epoch" if early else "no",
        )
        candidate.score = metrics_of(model.predict(held_back, **options))["nll"]
        candidate.stopped = tuple(early.epochs) if early else ()
        tried.append({**candidate.chosen(), "nll": candidate.score})
        if best is None or candidate.score < best.score:
            best, best_model = candidate, model
    assert best is not None
    assert best_model is not None
    chosen: dict[str, float] = best.chosen()
    if select["temperature"]:
        chosen["temperature"] = fit_temperature(best_model.predict(held_back, **options))
    seconds = time.perf_counter() - start
    if select["again"]:
        callbacks = [StopAfter(best.stopped)] if best.stopped else []
        best_model = fit(best.cell, Splits(train, train), folder / "again", callbacks=callbacks)
    if select["temperature"]:
        scaled = get_temperature(best_model.model) * chosen["temperature"]
        set_temperature(best_model.model, scaled)
    found = {
        "chosen": chosen,
        "search": tried,
        "held_back": len(held_back),
        "seconds_search": seconds,
    }
    return best_model, found


def _held_back(train: Dataset, part: float, seed: int) -> tuple[Dataset, Dataset]:
    """The labels to train candidates on, and those to compare them on; classes keep their share."""
    classes = "label" if "label" in train.column_names else None
    return split_dataset(train, part, seed=seed, label_column=classes)


def _candidates(cell: Cell) -> Iterator[_Candidate]:
    """Every combination of what may be chosen; what is not listed stays the cell's."""
    names = ("learning_rate", "strength", "epochs")
    lists = [cell.select[f"{n}s" if n != "epochs" else n] or (None,) for n in names]
    plain = replace(cell, select={})
    for values in product(*lists):
        given = {n: v for n, v in zip(names, values, strict=True) if v is not None}
        changed = plain
        if "learning_rate" in given:
            changed = replace(
                changed, training={**changed.training, "learning_rate": given["learning_rate"]}
            )
        if "strength" in given:
            options = {**changed.method_options, "strength": given["strength"]}
            changed = replace(changed, method_options=options)
        if "epochs" in given:
            changed = replace(changed, epochs=float(given["epochs"]))
        yield _Candidate(changed, given)
