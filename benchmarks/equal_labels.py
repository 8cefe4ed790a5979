"""The reading of the comparison on equal labels, for the README and docs/benchmarks.md.

    bara bench benchmarks/development/equal-labels-*.yaml benchmarks/development/unseen-*.yaml \
        --output benchmarks/results/development
    python benchmarks/equal_labels.py

The question: with the same labels in all, and none to choose with, is BaRA below the NLL of LoRA
that chose its learning rate and when to stop, and nowhere above that of logistic regression on the
frozen model? Once on the tasks that defaults were chosen on, and once on tasks that none was.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bara.bench.results import read_lines
from pages import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/development/results.jsonl"
METHODS = {"probe": "probe", "lora": "LoRA that chose", "bara as it is": "BaRA, nothing chosen"}
METRICS = ("accuracy", "nll", "ece")
SLICE = "equal-labels"
"""What the names of its benchmarks begin with."""
UNSEEN = "unseen"
"""What the names of the benchmarks begin with whose tasks no default was chosen on."""
PEERS = "equal-labels-peers"
"""The benchmark of the other methods with LoRA's search, one seed."""
CHOSE = "bara that chose"
"""BaRA with LoRA's search, among the peers."""
SEEDS_OF_THE_PACE = (0,)
"""On which the default of `head_input_std` was found."""


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


def lead(rows: list[dict[str, Any]], peer: str) -> tuple[float, float | None]:
    """By which part BaRA's NLL, the mean over the tasks, is below a peer's: the mean over the seeds
    and its standard error, paired by seed; None with one seed."""

    def nll(name: str, seed: int) -> float:
        return mean(row["nll"] for row in rows if (row["name"], row["seed"]) == (name, seed))

    seeds = {row["seed"] for row in rows}
    parts = [1 - nll("bara as it is", seed) / nll(peer, seed) for seed in seeds]
    return mean(parts), stdev(parts) / len(parts) ** 0.5 if len(parts) > 1 else None


def below(rows: list[dict[str, Any]], peer: str) -> str:
    """`lead` in words."""
    part, error = lead(rows, peer)
    return f"{part:.0%}" if error is None else f"{100 * part:.0f} ± {100 * error:.0f}%"


def above(rows: list[dict[str, Any]], peer: str) -> str:
    """The tasks where BaRA's mean NLL is above a peer's, with by how much."""
    tasks = means(rows).items()
    parts = {task: m["bara as it is"]["nll"] / m[peer]["nll"] - 1 for task, m in tasks}
    return ", ".join(f"{task} {part:.1%}" for task, part in parts.items() if part > 0) or "nowhere"


def seeds_of(rows: list[dict[str, Any]]) -> str:
    return ", ".join(map(str, sorted({row["seed"] for row in rows})))


def sentence(rows: list[dict[str, Any]]) -> str:
    """The answer on the tasks that defaults were chosen on."""
    others = [row for row in rows if row["seed"] not in SEEDS_OF_THE_PACE]
    alone = ""
    if others and len(others) < len(rows):
        alone = (
            f" Of the seeds that the default pace of BaRA's head was not found on alone: "
            f"{below(others, 'lora')} and {below(others, 'probe')}."
        )
    return (
        f"On equal labels (all that a method gets, with those it chooses by among them; seeds "
        f"{seeds_of(rows)}) BaRA's NLL is {below(rows, 'lora')} below that "
        f"of a LoRA that chose its learning rate and when to stop (above it: "
        f"{above(rows, 'lora')}), and {below(rows, 'probe')} below the probe's (above it: "
        f"{above(rows, 'probe')}).{alone}"
    )


def unseen_sentence(rows: list[dict[str, Any]]) -> str:
    """The answer on tasks that no default was chosen on."""
    return (
        f"On {len(means(rows))} tasks that no default of ours was chosen on (seeds "
        f"{seeds_of(rows)}), by the same protocol: {below(rows, 'lora')} below LoRA's (above it: "
        f"{above(rows, 'lora')}) and {below(rows, 'probe')} below the probe's (above it: "
        f"{above(rows, 'probe')})."
    )


def complete(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the seeds that every method has finished on every task."""
    cells = {(row["seed"], row["task"], row["name"]) for row in rows}
    tasks = {task for _, task, _ in cells}
    whole = [
        seed
        for seed in {seed for seed, _, _ in cells}
        if all((seed, task, name) in cells for task in tasks for name in METHODS)
    ]
    return [row for row in rows if row["seed"] in whole]


def finished(benchmarks: str = SLICE) -> list[dict[str, Any]]:
    """The rows of the comparison, of the seeds that every method has finished."""
    return complete([row for row in everything(benchmarks) if row["name"] in METHODS])


def everything(benchmarks: str = SLICE) -> list[dict[str, Any]]:
    """Every row on equal labels that has numbers, of the benchmarks of that beginning."""
    rows = [r for r in read_lines(RESULTS) if str(r["benchmark"]).startswith(benchmarks)]
    return [row for row in rows if "nll" in row]


def beside_peers() -> list[dict[str, Any]]:
    """The rows of the peers' tasks and of the seeds that BaRA with their search has finished, of
    all methods that have finished these."""
    rows = everything()
    of_peers = [row for row in rows if row["benchmark"] == PEERS]
    tasks = {row["task"] for row in of_peers}
    chose = {(row["task"], row["seed"]) for row in of_peers if row["name"] == CHOSE}
    seeds = {seed for _, seed in chose if all((task, seed) in chose for task in tasks)}
    cells = {(task, seed) for task in tasks for seed in seeds}
    done = defaultdict(set)
    for row in rows:
        done[row["name"]].add((row["task"], row["seed"]))
    names = {*METHODS, *(row["name"] for row in of_peers)}
    whole = {name for name in names if cells <= done[name]}
    return [row for row in rows if row["name"] in whole and (row["task"], row["seed"]) in cells]


def peers(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """The means of `beside_peers`, and the answer in a sentence."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    means = {
        name: {
            metric: mean(row[metric] for row in rows if row["name"] == name) for metric in METRICS
        }
        for name in names
    }
    order = sorted(means, key=lambda name: means[name]["nll"])
    shown = "; ".join(
        f"{METHODS.get(name, name)} "
        + " / ".join(f"{means[name][metric]:.3f}" for metric in METRICS)
        for name in order
    )
    where = f"seeds {seeds_of(rows)}; {len(tasks)} tasks: {', '.join(tasks)}"
    ours = means["bara as it is"]["nll"]
    others = [name for name in order if name not in (*METHODS, CHOSE)]
    below = [f"{1 - ours / means[name]['nll']:.0%}" for name in others]
    listed = ", ".join(f"{name} {part}" for name, part in zip(others, below, strict=True))
    chose = means[CHOSE]["nll"] / ours - 1
    return (
        f"The other methods with LoRA's search ([{where}](results/development/{PEERS}.md)), by "
        f"NLL; accuracy / NLL / ECE: {shown}.",
        f"By which part BaRA's NLL is below that of other methods that chose in LoRA's way "
        f"({where}): {listed}. BaRA that chooses too: {chose:+.1%}.",
    )


def main() -> None:
    rows, unseen = finished(), finished(UNSEEN)
    answer, of_unseen = sentence(rows), unseen_sentence(unseen)
    details, short = peers(beside_peers())
    text = f"\n{answer}\n\n{table(means(rows))}\n\n{short}\n"
    write_between(ROOT / "README.md", "equal labels", text)
    text = f"\n{of_unseen}\n\n{table(means(unseen))}\n"
    write_between(ROOT / "README.md", "unseen tasks", text)
    write_between(ROOT / "docs/benchmarks.md", "equal labels", f"{answer} {of_unseen} {details}")


if __name__ == "__main__":
    main()
