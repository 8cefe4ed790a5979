"""The page docs/serving-results.md, from what the benchmarks of `bara serve` have written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from bara.bench.results import read_lines
from bara.files import atomic_write_text

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/serving-results.md"
SPEED = ROOT / "benchmarks/results/serving.jsonl"
SOAK = ROOT / "benchmarks/results/soak.jsonl"
TITLES = {
    "minilm": "MiniLM, one tweet a request",
    "smollm2": "SmolLM2-135M-Instruct, 16 new tokens a request",
}


def write_page() -> None:
    """Writes it from the files that there are."""
    lines = ["# Serving, measured", ""]
    lines += ["Made by the commands below from `benchmarks/results`; do not edit.", ""]
    speed, soak = read_lines(SPEED), read_lines(SOAK)
    if speed:
        lines += _speed(speed)
    if soak:
        lines += _soak(soak)
    atomic_write_text(PAGE, "\n".join(lines).rstrip() + "\n")


def _speed(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]["versions"]
    types = ", ".join(sorted({row["dtype"] for row in rows}))
    lines = [
        "## Throughput and latency",
        "",
        "`OMP_NUM_THREADS=2 python benchmarks/serving.py`. Every client asks again when it has its "
        "answer; clients and server share the two cores. BaRA answers with 10 draws for a tweet "
        "and with 4 for a text, LoRA with its one. The loop has no server: single calls "
        "of `bara.predict` and `bara.generate`, one at a time. Plain transformers is one pass for "
        "each request behind FastAPI, in order of arrival.",
        "",
        f"{first['machine']}, {types}, without autocast, torch {first['torch']}, transformers "
        f"{first['transformers']}. Load average of the machine at the end of the cells: "
        f"{min(row['load'] for row in rows):.1f} to {max(row['load'] for row in rows):.1f}.",
    ]
    for model, title in TITLES.items():
        mine = [row for row in rows if row["model"] == model]
        if not mine:
            continue
        lines += ["", f"### {title}", ""]
        lines += [
            "| | clients | requests | requests / s | p50, s | p99, s |",
            "|---|---|---|---|---|---|",
        ]
        for row in mine:
            taken = row["seconds"]
            p99 = quantiles(taken, n=100, method="inclusive")[98] if len(taken) > 1 else taken[0]
            lines.append(
                f"| {row['system']} | {row['clients']} | {len(taken)} | "
                f"{len(taken) / row['wall']:.2f} | {median(taken):.3f} | {p99:.3f} |"
            )
    return [*lines, ""]


def _soak(rows: list[dict[str, Any]]) -> list[str]:
    minutes = [row for row in rows if "minute" in row]
    counts: Counter[str] = Counter()
    for row in minutes:
        counts.update(row["counts"])
    kinds = sorted({name.partition(": ")[0] for name in counts})
    outcomes = sorted({name.partition(": ")[2] for name in counts} | {"wrong", "lost"})
    lives = Counter(row["life"] for row in minutes)
    longest = max(lives, key=lambda life: lives[life])
    memory = [row for row in minutes if row["life"] == longest][1:]  # the first one starts it
    lines = [
        "## Half an hour of mixed load",
        "",
        f"`python benchmarks/soak.py`: {minutes[0]['clients']} clients, a server of MiniLM and "
        f"SmolLM2-135M-Instruct under a supervisor, {minutes[-1]['minute']:.0f} minutes, "
        f"{minutes[-1]['life'] - 1} times killed with SIGKILL and started again. "
        "`right` is the answer of `bara.predict` or `bara.generate` with that seed, computed "
        "before; the largest difference of a probability "
        f"was {max(row['largest difference'] for row in minutes):.1g}. `lost` would be a request "
        "with neither answer nor error. `late` is a 504 after the server's 20 seconds, in a stream "
        "that has begun an error event. Connections are refused or broken while the server is dead "
        "and starts again. Other work may have kept the machine busy: this is about answers, not "
        "about speed.",
        "",
        "| | " + " | ".join(outcomes) + " |",
        "|---" * (len(outcomes) + 1) + "|",
    ]
    lines += [
        f"| {kind} | " + " | ".join(str(counts[f"{kind}: {o}"]) for o in outcomes) + " |"
        for kind in kinds
    ]
    if len(memory) >= 3:
        third = len(memory) // 3
        early, late = (
            mean(value for row in part for value in row["memory_mib"] if value)
            for part in (memory[:third], memory[-third:])
        )
        by_minute = [mean(value for value in row["memory_mib"] if value) for row in memory]
        lines += [
            "",
            f"Memory of the server in its longest life ({len(memory)} minutes after the first): "
            f"{early:.0f} MiB in the mean of the first third, {late:.0f} MiB in that of the last. "
            "By minute: " + ", ".join(f"{value:.0f}" for value in by_minute) + ".",
        ]
    return [*lines, ""]


if __name__ == "__main__":
    write_page()
