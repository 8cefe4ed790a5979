"""The reading of the comparison on equal labels, for the README and docs/benchmarks.md.

    bara bench benchmarks/development/equal-labels-*.yaml --output benchmarks/results/development
    python benchmarks/equal_labels.py

The question: with the same labels in all, and none to choose with, is BaRA below the NLL of LoRA
that chose its learning rate and when to stop, and nowhere above that of logistic regression on the
frozen model?
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from bara.bench.results import read_lines
from pages import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/development/results.jsonl"
METHODS = {"probe": "probe", "lora": "LoRA that chose", "bara as it is": "BaRA, nothing chosen"}
METRICS = ("accuracy", "nll", "ece")


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean over seeds, by task, method and metric; of tasks that all methods have."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found = {
        task: {
            name: [row for row in rows if row["task"] == task and row["name"] == name]
            for name in METHODS
        }
        for task in tasks
    }
    return {
        task: {
            name: {metric: mean(row[metric] for row in cells) for metric in METRICS}
            for name, cells in methods.items()
        }
        for task, methods in found.items()
        if all(methods.values())
    }


def table(tasks: dict[str, dict[str, dict[str, float]]]) -> str:
    """Accuracy / NLL / ECE of every task and of their mean, as Markdown."""
    lines = ["| accuracy / NLL / ECE | " + " | ".join(METHODS.values()) + " |"]
    lines.append("|---|" + "---|" * len(METHODS))
    everywhere = {
        name: {metric: mean(task[name][metric] for task in tasks.values()) for metric in METRICS}
        for name in METHODS
    }
    for task, methods in {**tasks, "mean": everywhere}.items():
        cells = [" / ".join(f"{methods[n][metric]:.3f}" for metric in METRICS) for n in METHODS]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sentence(tasks: dict[str, dict[str, dict[str, float]]], seeds: list[int]) -> str:
    """The answer in words."""

    def nll(method: str) -> float:
        return mean(task[method]["nll"] for task in tasks.values())

    def worse(peer: str) -> str:
        names = [t for t, m in tasks.items() if m["bara as it is"]["nll"] > m[peer]["nll"]]
        return ", ".join(names) or "nowhere"

    parts = [f"{1 - nll('bara as it is') / nll(peer):.0%}" for peer in ("lora", "probe")]
    return (
        f"On equal labels (all that a method gets, with those it chooses by among them; seed "
        f"{', '.join(map(str, seeds))}) BaRA's NLL is {parts[0]} below that of a LoRA that chose "
        f"its learning rate and when to stop (above it: {worse('lora')}), and {parts[1]} below the "
        f"probe's (above it: {worse('probe')})."
    )


def main() -> None:
    rows = [r for r in read_lines(RESULTS) if str(r["benchmark"]).startswith("equal-labels")]
    tasks = means(rows)
    answer = sentence(tasks, sorted({row["seed"] for row in rows}))
    write_between(ROOT / "README.md", "equal labels", f"\n{answer}\n\n{table(tasks)}\n")
    write_between(ROOT / "docs/benchmarks.md", "equal labels", answer)


if __name__ == "__main__":
    main()
