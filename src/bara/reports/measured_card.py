"""What was measured of an adapter, written into its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bara.cards.card_file import table_rows, write_sections
from bara.errors import BaraError
from bara.ranks.effective_rank import EffectiveRank


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

    Args:
        folder: an adapter that was saved with `save_pretrained`.
        metrics: `bara.evaluate(...).metrics`.
        num_draws: the posterior draws behind the metrics.
        rank: what `bara.effective_rank` returned.
        data: name of the data they were measured on.

    Raises:
        BaraError: there is no such folder, or the card is damaged or cannot be written.
    """
    if not Path(folder).is_dir():
        raise BaraError(f"there is no adapter folder {folder}")
    sections = {}
    if metrics is not None:
        sections["metrics"] = _metrics_section(metrics, num_draws, data)
    if rank is not None:
        sections["rank"] = _rank_section(rank, data)
    write_sections(Path(folder), sections, tags=())


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
