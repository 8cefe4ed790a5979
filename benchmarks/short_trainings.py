"""Short and slow trainings: what LoRA and BaRA reach there, for the README.

    bara bench benchmarks/development/bara-{short,slow,three-epochs}.yaml --output FOLDER
    python benchmarks/short_trainings.py

FOLDER is benchmarks/results/development. The question: with both at their defaults, is BaRA's NLL
below LoRA's, and its accuracy not lower, in the mean of the tasks of each training?
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from bara.bench.results import read_lines
from pages import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/development/results.jsonl"
TRAININGS = {
    "300 texts, 50 steps at 1e-3": ("bara-short", ""),
    "300 texts, 200 steps at 3e-4": ("bara-slow", " at 3e-4"),
    "300 texts, 200 steps at 1e-4": ("bara-slow", " at 1e-4"),
    "1,000 texts, 96 steps at 3e-4": ("bara-three-epochs", ""),
}
"""Benchmarks, and what the names of their methods end with."""
METHODS = {"lora": "LoRA", "bara": "BaRA"}
METRICS = ("accuracy", "nll", "ece")


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy / NLL / ECE of every training, means over its tasks and seeds, as Markdown."""
    lines = ["| accuracy / NLL / ECE | " + " | ".join(METHODS.values()) + " |"]
    lines.append("|---|" + "---|" * len(METHODS))
    for training, (benchmark, ending) in TRAININGS.items():
        of_it = [row for row in rows if row["benchmark"] == benchmark and "nll" in row]
        cells = {
            method: {(r["task"], r["seed"]): r for r in of_it if r["name"] == method + ending}
            for method in METHODS
        }
        shared = set.intersection(*(set(found) for found in cells.values()))
        numbers = [
            " / ".join(f"{mean(found[cell][metric] for cell in shared):.3f}" for metric in METRICS)
            for found in cells.values()
        ]
        lines.append(f"| {training} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    write_between(ROOT / "README.md", "short trainings", f"\n{table(read_lines(RESULTS))}\n")


if __name__ == "__main__":
    main()
