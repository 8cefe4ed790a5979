"""Is it worth to choose which texts to label?

    python benchmarks/active_learning.py --data FOLDER
    python benchmarks/active_learning.py --analyse

BaRA is trained on 60 labelled texts; then three times 60 more of a pool are labelled, chosen by a
strategy of `bara.select` with the model trained so far, or at random, and BaRA is trained anew,
always with the library's default recipe, 20 epochs, so that the steps grow with the labels.
Strategies share the first 60 texts, the pool and the test texts. FOLDER has `tweet_eval_emotion`
as `bara bench --data` reads it; the other task comes with a package. Every finished round is
appended to benchmarks/results/active_learning.jsonl at once; a second run goes on where the first
stopped. The analysis writes docs/active-learning-results.md with its picture, and the verdict in
docs/labelling.md.

Irony was the second task that was thought of. It was given up before a curve was run: from 300
texts MiniLM does hardly better there than the most frequent class (docs/rank-recommendation.md).

Decided before the run: a strategy beats chance if its accuracy less that of random choice, averaged
over the rounds of a curve (120, 180, 240 labels), is on average over the curves (tasks and seeds)
more than two standard errors above 0.
"""

from __future__ import annotations

import argparse
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure

from bara.bench.results import append_row, read_lines
from bara.bench.tasks import load_task
from bara.evaluation.acquisition import FEATURES, select
from bara.evaluation.evaluate import evaluate
from bara.files import atomic_write_text
from bara.machine import fast_bfloat16, quieten_libraries, versions
from bara.methods.recipe import TRAINING_DEFAULTS
from bara.prediction.predict import predict
from bara.ranks.features import adapter_features
from bara.reports.style import LIGHT, save_figure
from pages import write_between
from small_texts import trained

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/active_learning.jsonl"
PAGE = ROOT / "docs/active-learning-results.md"
GUIDE = ROOT / "docs/labelling.md"
MARK = "labelling-verdict"
TITLE = "# Choosing what to label, against chance"
PICTURE = ROOT / "docs/images/active-learning.png"

TASKS = ("tweet_eval_emotion", "tweet-sentiment")
RANDOM, DEFAULT = "random", "batch"
STRATEGIES = (RANDOM, "batch", "bald", "entropy", "diversity")
START = "start"
ROUNDS = (60, 120, 180, 240)
POOL, NUM_TEST, NUM_DRAWS = 360, 400, 10
EPOCHS = TRAINING_DEFAULTS["num_train_epochs"]


def run(task: str, seed: int, labelled: list[int], wanted: list[str], data: Path) -> dict[str, Any]:
    """Trains on some rows of the pool, measures, and chooses the rows to label next.

    Returns:
        Metrics, and in `next` the chosen rows of each wanted strategy.
    """
    pool, _, test = load_task(task, data).sample(ROUNDS[0] + POOL, 0, NUM_TEST, seed)
    model, tokenizer, kind, seconds = trained(pool.select(labelled), seed, "bara", {})
    options: dict[str, Any] = {"progress": False, "batch_size": 256}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bfloat16()):
        rows = kind.inputs(test, tokenizer)
        metrics = evaluate(model, rows, deterministic=True, **options).metrics
        rest = [i for i in range(len(pool)) if i not in set(labelled)]
        inputs = kind.inputs(pool.select(rest), tokenizer, labels=False)
        count = ROUNDS[1] - ROUNDS[0]
        chosen: dict[str, list[int]] = {}
        if scored := [name for name in wanted if name != RANDOM]:
            predictive = predict(model, inputs, num_draws=NUM_DRAWS, seed=seed, **options)
            features = None
            if set(scored) & set(FEATURES):
                features = adapter_features(model, inputs, **options)
            for name in scored:
                picked = select(predictive, count, by=name, features=features, seed=seed)
                chosen[name] = [rest[i] for i in picked.index.tolist()]
    if RANDOM in wanted:
        generator = torch.Generator().manual_seed(1000 * seed + len(labelled))
        chosen[RANDOM] = [rest[i] for i in torch.randperm(len(rest), generator=generator)[:count]]
    return {
        **{name: metrics[name] for name in ("accuracy", "nll", "ece")},
        "next": chosen,
        "seconds": seconds,
        "num_test": len(test),
        "versions": versions(),
    }


def missing_rounds(strategies: list[str], tasks: list[str], seeds: list[int], data: Path) -> None:
    """Runs what is not yet in the results, one round after the other."""
    for seed, task, strategy in product(seeds, tasks, strategies):
        labelled = list(range(ROUNDS[0]))
        for size in ROUNDS:
            name = START if size == ROUNDS[0] else strategy
            key = {"task": task, "seed": seed, "strategy": name, "labels": size}
            row = next((row for row in read_lines(RESULTS) if key.items() <= row.items()), None)
            if row is None:
                wanted = list(STRATEGIES) if name == START else [strategy]
                row = key | run(task, seed, labelled, wanted if size < ROUNDS[-1] else [], data)
                append_row(RESULTS, row)
                print(key, f"accuracy {row['accuracy']:.3f}, {row['seconds']:.0f} s", flush=True)
            if size < ROUNDS[-1]:
                labelled = labelled + row["next"][strategy]


def curve(rows: list[dict[str, Any]], task: str, seed: int, strategy: str) -> list[dict[str, Any]]:
    """The rounds of a strategy, the shared first one among them."""
    names = (START, strategy)
    mine = [r for r in rows if r["task"] == task and r["seed"] == seed and r["strategy"] in names]
    return sorted(mine, key=lambda row: row["labels"])


def whole(rows: list[dict[str, Any]]) -> tuple[list[tuple[str, int]], list[str]]:
    """The tasks and seeds with curves of chance and of the default strategy, and the strategies
    that have curves of all of these."""

    def has(pair: tuple[str, int], name: str) -> bool:
        return len(curve(rows, *pair, name)) == len(ROUNDS)

    pairs = sorted({(row["task"], row["seed"]) for row in rows})
    pairs = [pair for pair in pairs if has(pair, RANDOM) and has(pair, DEFAULT)]
    return pairs, [name for name in STRATEGIES if all(has(pair, name) for pair in pairs)]


def gains(
    rows: list[dict[str, Any]], pairs: list[tuple[str, int]], strategy: str, metric: str
) -> list[float]:
    """A strategy's metric less that of random choice, averaged over the later rounds, by curve."""
    found = []
    for pair in pairs:
        ours, chance = (curve(rows, *pair, name)[1:] for name in (strategy, RANDOM))
        found.append(mean(a[metric] - b[metric] for a, b in zip(ours, chance, strict=True)))
    return found


def write_guide(verdict: str) -> None:
    """Puts the verdict between the marks of the guide."""
    write_between(GUIDE, MARK, f"{verdict}: [the curves](active-learning-results.md).")


def write_page(rows: list[dict[str, Any]]) -> None:
    """The verdict, the curves, every round."""
    curves, strategies = whole(rows)
    pairs = len(curves)
    if pairs < 2:
        write_guide("It is **not yet known** whether choosing beats chance")
        text = f"{TITLE}\n\n`python benchmarks/active_learning.py` has no two curves yet.\n"
        atomic_write_text(PAGE, text)
        return
    tasks = sorted({task for task, _ in curves})
    seeds = sorted({seed for _, seed in curves})
    better, worse, table = [], [], []
    for strategy in strategies[1:]:
        accuracy, nll = (gains(rows, curves, strategy, metric) for metric in ("accuracy", "nll"))
        error = stdev(accuracy) / sqrt(pairs)
        found = f"{mean(accuracy):+.3f} ± {error:.3f}"
        group = better if mean(accuracy) > 2 * error else worse
        group.append(f"`{strategy}` ({found})")
        above = sum(value > 0 for value in accuracy)
        table.append(
            f"| {strategy} | {found} | {above} of {pairs} | "
            f"{mean(nll):+.3f} ± {stdev(nll) / sqrt(pairs):.3f} |"
        )
    if better:
        said = f"**`bara select` pays here**, by {' and '.join(better)}"
        said += f", not by {' and '.join(worse)}" if worse else ""
    else:
        said = f"**`bara select` does not pay here**, by {' or '.join(worse)}"
    where = f"on {len(tasks)} tasks with {len(seeds)} seeds"
    said += f": accuracy less that of random choice, ± standard error, {where}"
    if missing := [name for name in STRATEGIES if name not in strategies]:
        said += f" ({', '.join(missing)} not measured)"
    write_guide(said)
    step = ROUNDS[1] - ROUNDS[0]
    lines = [
        TITLE,
        "",
        "Made by `python benchmarks/active_learning.py --analyse` from "
        "`benchmarks/results/active_learning.jsonl`; do not edit. The runs are those of "
        "`python benchmarks/active_learning.py --data FOLDER`.",
        "",
        f"{said}. The rule was written down before the runs: accuracy less that of random "
        f"choice, averaged over {', '.join(map(str, ROUNDS[1:]))} labels, must be more than two "
        f"standard errors above 0 over the {pairs} curves (task and seed), which are few.",
        "",
        "| `--by` | accuracy less that of chance, ± standard error | curves above chance | NLL "
        "less that of chance |",
        "|---|---|---|---|",
        *table,
        "",
        "![Accuracy by number of labels](images/active-learning.png)",
        "",
        "BaRA on MiniLM-L6, trained anew in every round with the default recipe of `bara train` "
        f"({EPOCHS} epochs, so that the steps grow with the labels); a pool of {POOL} texts, "
        f"{step} of them labelled a round; {NUM_DRAWS} draws judge the pool; "
        f"{rows[0]['num_test']} test texts, posterior mean. Strategies of a task and a seed share "
        "the first texts, the pool and the test texts.",
        "",
        "## Every round",
        "",
        "| task | seed | strategy | labels | accuracy | NLL | ECE |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["task"], r["seed"], r["strategy"], r["labels"])):
        numbers = " | ".join(f"{row[name]:.3f}" for name in ("accuracy", "nll", "ece"))
        names = (row["task"], row["seed"], row["strategy"], row["labels"])
        lines.append(f"| {' | '.join(map(str, names))} | {numbers} |")
    atomic_write_text(PAGE, "\n".join(lines) + "\n")
    save_figure(picture(rows, curves, strategies), PICTURE)


def picture(
    rows: list[dict[str, Any]], pairs: list[tuple[str, int]], strategies: list[str]
) -> Figure:
    """Mean accuracy over seeds against labels, a panel for each task."""
    tasks = sorted({task for task, _ in pairs})
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for ax, task in zip(axes, tasks, strict=True):
        for strategy, colour in zip(strategies, LIGHT.series, strict=False):
            curves = [curve(rows, *pair, strategy) for pair in pairs if pair[0] == task]
            ys = [
                mean(point["accuracy"] for point in points) for points in zip(*curves, strict=True)
            ]
            style = "--" if strategy == RANDOM else "-"
            ax.plot(ROUNDS, ys, style, color=colour, marker="o", ms=3, label=strategy)
        ax.set_title(task, fontsize=9)
        ax.set_xlabel("labels")
        ax.set_xticks(ROUNDS)
        ax.grid(color=LIGHT.grid, lw=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
    axes[0].set_ylabel("test accuracy")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("."), help="folder of the file tasks")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--analyse", action="store_true", help="write the page; train nothing")
    arguments = parser.parse_args()
    if not arguments.analyse:
        quieten_libraries()
        missing_rounds(arguments.strategies, arguments.tasks, arguments.seeds, arguments.data)
    write_page(read_lines(RESULTS))


if __name__ == "__main__":
    main()
