"""One cell: train, predict, measure. The same code for every method."""

from __future__ import annotations

import platform
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from bara.bench.corruptions import corrupt
from bara.bench.measure import (
    by_draws,
    curves,
    first_draws,
    metrics_of,
    rank_numbers,
)
from bara.bench.models import Fitted, fit
from bara.bench.select import fit_selected
from bara.bench.spec import Cell
from bara.bench.tasks import Splits, first, load_task
from bara.draws.draws import draw_source
from bara.errors import BaraError
from bara.evaluation.metrics import classification_metrics
from bara.machine import versions
from bara.prediction.predictive import ClassificationPredictive, Predictive
from bara.prediction.temperature import Tempered, fit_temperature

PACKAGES = ("datasets", "accelerate", "scikit-learn", "numpy")
"""Besides those of `bara.machine.versions`, for the record."""


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains and measures one cell.

    Returns:
        What is kept of it: the cell's fields and key, its metrics (`bara.bench.measure`), the same
        under shift, seconds, peak memory in MiB, trained parameters, and versions; with a search
        what was chosen and how long it took.

    Raises:
        BaraError: the model, the method or the data cannot be used.
    """
    splits = load_task(cell.task, cell.data)
    train, validation, test = splits.sample(
        cell.train_size, cell.num_validation, cell.num_test, cell.seed
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        found: dict[str, Any] = {}
        if cell.select:
            fitted, found = fit_selected(cell, train, Path(folder))
        else:
            fitted = fit(cell, Splits(train, test, validation), Path(folder))
        trained = time.perf_counter()
        memory = peak_memory()
        options: dict[str, Any] = {
            "num_draws": max(cell.num_draws, *cell.draws, 1),
            "seed": cell.seed,
        }
        every = fitted.predict(test, **options)
        predicted = time.perf_counter()
        source = draw_source(fitted.model)  # an ensemble always has all of its members
        predictive = first_draws(
            every, source.num_draws(cell.num_draws) if source else cell.num_draws
        )
        row = {
            "key": cell.key,
            **asdict(cell),
            "kind": splits.kind,
            **metrics_of(predictive),
            "seconds_train": trained - start - found.get("seconds_search", 0.0),
            "seconds_predict": predicted - trained,
            "peak_memory_mib": memory,
            "parameters": fitted.parameters,
            **found,
            **curves(predictive),
            "by_draws": by_draws(every, cell.draws),
            **_more(cell, fitted, predictive, validation, test),
        }
    row["seconds"] = time.perf_counter() - start
    row["versions"] = versions() | {name: version(name) for name in PACKAGES}
    row["machine"] = platform.node()
    row["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    return row


def _more(
    cell: Cell,
    fitted: Fitted,
    predictive: Predictive,
    validation: Dataset | None,
    test: Dataset,
) -> dict[str, Any]:
    """The measurements beyond the test set's own."""
    options: dict[str, Any] = {"num_draws": cell.num_draws, "seed": cell.seed}
    more: dict[str, Any] = {}
    if predictive.num_draws > 1:
        more["deterministic"] = metrics_of(fitted.predict(test, deterministic=True))
    if (rank := fitted.rank(test)) is not None:
        more |= rank_numbers(rank, predictive)
    if validation is not None:
        temperature = fit_temperature(fitted.predict(validation, **options))
        assert isinstance(predictive, Tempered)
        scaled = metrics_of(predictive.tempered(temperature))
        more["temperature"] = {"value": temperature, **scaled}
    if isinstance(predictive, ClassificationPredictive):
        more |= _ood(cell, fitted, predictive)
    shifted = first(test, cell.num_shift)
    more["shift"] = {
        f"{kind}-{severity}": metrics_of(
            fitted.predict(corrupted(shifted, kind, severity, cell.seed), **options)
        )
        for kind in cell.corruptions
        for severity in cell.severities
    }
    more["transfer"] = {
        name: metrics_of(fitted.predict(_test_of(name, cell, cell.num_test), **options))
        for name in cell.transfer
    }
    return more


def _ood(cell: Cell, fitted: Fitted, predictive: ClassificationPredictive) -> dict[str, Any]:
    """Detection of each out-of-distribution task, and the means over them."""
    detection: dict[str, dict[str, float]] = {}
    for name in cell.ood:
        elsewhere = fitted.predict(
            _test_of(name, cell, cell.num_ood),
            labels=False,
            num_draws=cell.num_draws,
            seed=cell.seed,
        )
        assert isinstance(elsewhere, ClassificationPredictive)
        metrics = classification_metrics(predictive, ood=elsewhere)
        detection[name] = {key: metrics[key] for key in ("ood_auroc", "ood_fpr95")}
    if not detection:
        return {}
    means = {
        key: sum(values[key] for values in detection.values()) / len(detection)
        for key in ("ood_auroc", "ood_fpr95")
    }
    return {"ood_tasks": detection, **means}


def _test_of(name: str, cell: Cell, count: int) -> Dataset:
    return load_task(name, cell.data).sample(1, 0, count, cell.seed)[2]


def corrupted(table: Dataset, kind: str, severity: int, seed: int) -> Dataset:
    """The table with its texts, questions or prompts corrupted.

    Raises:
        BaraError: it has none.
    """
    columns = ("text", "question", "prompt")
    column = next((name for name in columns if name in table.column_names), None)
    if column is None:
        raise BaraError("only texts and questions can be corrupted: leave `corruptions` empty")
    texts = corrupt(table[column], kind, severity, seed=seed)
    return table.remove_columns(column).add_column(column, texts)


def peak_memory() -> float | None:
    """The most memory that this process, or its tensors on a GPU, have had, in MiB; None where
    the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
