"""What was measured of an adapter, written into its card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult

from bara.cards.adapter_files import CONFIG_FILE
from bara.cards.card_file import SOURCE, table_rows, write_sections
from bara.errors import BaraError
from bara.ranks.effective_rank import EffectiveRank

HUB_TASKS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
}
"""What the hub calls PEFT's tasks; a regression of texts is a text classification there."""


def write_model_card(
    folder: str | Path,
    *,
    metrics: Mapping[str, float] | None = None,
    num_draws: int | None = None,
    rank: EffectiveRank | None = None,
    data: str | None = None,
) -> None:
    """Adds metrics or the effective rank to the README.md of an adapter's folder.

    A section that is there already is replaced; everything else in the file stays. Saving the
    adapter again removes both sections, because they were measured on other weights.

    Metrics of named data are also written as `model-index`, which the hub reads: one
    `huggingface_hub.EvalResult` each, beside those that others wrote.

    Args:
        folder: an adapter that was saved with `save_pretrained`.
        metrics: `bara.evaluate(...).metrics`.
        num_draws: the posterior draws behind the metrics.
        rank: what `bara.effective_rank` returned.
        data: name of the data they were measured on: a data set of the hub, or a file, of which
            `model-index` has the last part.

    Raises:
        BaraError: there is no such folder, or the card is damaged or cannot be written.
    """
    if not Path(folder).is_dir():
        raise BaraError(f"there is no adapter folder {folder}")
    sections = {}
    results = []
    if metrics is not None:
        sections["metrics"] = _metrics_section(metrics, num_draws, data)
        if data is not None:
            results = _results(metrics, num_draws, data, _hub_task(Path(folder)))
    if rank is not None:
        sections["rank"] = _rank_section(rank, data)
    write_sections(Path(folder), sections, tags=(), results=results)


def _results(
    metrics: Mapping[str, float], num_draws: int | None, data: str, task: str
) -> list[EvalResult]:
    """The metrics that are numbers, as the hub wants them."""
    name = Path(data).name if Path(data).exists() else data
    return [
        EvalResult(
            task_type=task,
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_name=metric,
            metric_value=float(value),
            metric_args={"num_draws": num_draws} if num_draws else None,
            source_name="bara",
            source_url=SOURCE,
        )
        for metric, value in metrics.items()
        if math.isfinite(value)
    ]


def _hub_task(folder: Path) -> str:
    """The hub's name of the task; "other" where the folder does not tell."""
    try:
        saved = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        return HUB_TASKS[saved["task_type"]]
    except (OSError, ValueError, KeyError, TypeError):
        return "other"


def _metrics_section(metrics: Mapping[str, float], num_draws: int | None, data: str | None) -> str:
    where = _where(data) + (f"{num_draws} posterior draws." if num_draws else "")
    rows = table_rows({name: f"{value:.4f}" for name, value in metrics.items()})
    lines = ["## Calibration metrics\n", f"{where}\n", "| metric | value |", "|---|---|", rows]
    return "\n".join(lines) + "\n"


def _rank_section(rank: EffectiveRank, data: str | None) -> str:
    spread = "" if rank.s_bar_std is None else f" ± {rank.s_bar_std:.2f} over draws"
    lines = [
        "## Effective rank\n",
        f"{_where(data)}mean over layers and {rank.soft.shape[1]} inputs: s_bar = "
        f"{rank.s_bar:.2f}{spread}.\n",
        "| layer | effective rank | maximum |",
        "|---|---|---|",
    ]
    rows = zip(rank.layers, rank.per_layer.tolist(), rank.max_rank, strict=True)
    lines += [f"| {name} | {mean:.2f} | {largest} |" for name, mean, largest in rows]
    return "\n".join(lines) + "\n"


def _where(data: str | None) -> str:
    return f"On `{data}`, " if data else ""
