"""Does the generalisation gap follow the effective rank, or the maximum rank?

    python benchmarks/rank_and_gap.py --shard 0/2 &
    python benchmarks/rank_and_gap.py --shard 1/2; wait
    python benchmarks/rank_and_gap.py --analyse

Every finished cell is appended to benchmarks/results/rank_and_gap.jsonl at once; a second run goes
on where the first stopped. About 4 minutes a cell on one core. The analysis writes
docs/rank-and-gap.md and docs/images/rank-and-gap.png.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from bara.bench.results import append_row, read_lines
from bara.data.examples import load_sentiment, minilm_path
from bara.evaluation.evaluate import evaluate
from bara.files import atomic_write_text
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.machine import fast_bfloat16, quieten_libraries, versions
from bara.methods.recipe import TrainRecipe
from bara.quickstart import MAX_LENGTH
from bara.ranks.effective_rank import effective_rank
from bara.reports.style import LIGHT, save_figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/rank_and_gap.jsonl"
PAGE = ROOT / "docs/rank-and-gap.md"
PICTURE = ROOT / "docs/images/rank-and-gap.png"

RANKS = (4, 8, 16, 32, 64)
SIZES = (100, 300, 1000)
PRIORS: dict[str, dict[str, float]] = {
    "default": {},
    "sparse": {"global_prior": 0.01, "local_prior": 0.1},
    "dense": {"global_prior": 0.9, "local_prior": 0.9},
}
OBJECTIVE = {
    "kl_weight": 1.0,
    "local_kl_weight": 0.003,
    "local_prior": 0.25,
    "init_noise": 0.05,
    "noise_prior": 0.25,
    "weight_noise": 0.0,
    "init_local_logit": 3.0,
}
"""BaRA's: the ELBO itself, and the noise that was the default when the cells were made."""
NUM_TEST, NUM_SEEN = 600, 300
GAPS = {
    "gap_nll_mean": "NLL, mean of the posterior",
    "gap_error_mean": "error rate, mean of the posterior",
    "gap_nll_mixture": "NLL, mixture of draws",
    "gap_error_mixture": "error rate, mixture of draws",
}
NUM_RESAMPLES = 2000


class Cell(NamedTuple):
    """One training run."""

    method: str
    prior: str
    r: int
    num_train: int
    seed: int


def grid(ranks: list[int], sizes: list[int], seeds: list[int]) -> list[Cell]:
    """Both methods over ranks and sizes; the other priors at the middle size only."""
    cells = []
    for seed in seeds:
        for r in ranks:
            for size in sizes:
                cells += [Cell("lora", "default", r, size, seed)]
                priors = PRIORS if size == sorted(sizes)[len(sizes) // 2] else ["default"]
                cells += [Cell("bara", prior, r, size, seed) for prior in priors]
    return cells


def run_cell(cell: Cell, steps: int, num_test: int, num_draws: int) -> dict[str, Any]:
    """Trains one adapter for a number of steps and measures it on seen and unseen texts."""
    data = load_sentiment(cell.num_train, num_test, num_validation=0, seed=cell.seed)
    with tempfile.TemporaryDirectory() as folder:
        recipe = TrainRecipe(
            model=str(minilm_path()),
            output=str(Path(folder) / "adapter"),
            method=cell.method,
            # the same scaling lora_alpha / r for every rank
            method_options={
                "r": cell.r,
                "lora_alpha": 2 * cell.r,
                **(OBJECTIVE if cell.method == "bara" else {}),
                **PRIORS[cell.prior],
            },
            training={
                "max_steps": steps,
                "save_strategy": "no",
                "bf16": fast_bfloat16(),
                "use_cpu": not torch.cuda.is_available(),
            },
            max_length=MAX_LENGTH,
            seed=cell.seed,
        )
        start = time.perf_counter()
        model, tokenizer, task = load_adapter(finetune(recipe, data.train))
        seconds = time.perf_counter() - start
    seen = data.train.select(range(min(NUM_SEEN, cell.num_train)))
    inputs = {
        "train": task.inputs(seen, tokenizer),
        "test": task.inputs(data.test, tokenizer),
    }
    result: dict[str, Any] = {**cell._asdict(), "steps": steps, "num_test": num_test}
    result["seconds"] = seconds
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bfloat16()):
        result["s_bar"] = (
            float(cell.r)
            if cell.method == "lora"
            else effective_rank(model, inputs["train"], progress=False).s_bar
        )
        for mode in ("mean", "mixture"):
            for part, rows in inputs.items():
                if mode == "mixture" and cell.method == "lora":
                    metrics = {k: result[f"{part}_{k}_mean"] for k in ("nll", "error")}
                else:
                    options = {"deterministic": mode == "mean", "num_draws": num_draws}
                    metrics = evaluate(
                        model, rows, progress=False, batch_size=256, **options
                    ).metrics
                    metrics["error"] = 1 - metrics["accuracy"]
                for name in ("nll", "error"):
                    result[f"{part}_{name}_{mode}"] = metrics[name]
            for name in ("nll", "error"):
                gap = result[f"test_{name}_{mode}"] - result[f"train_{name}_{mode}"]
                result[f"gap_{name}_{mode}"] = gap
    return result | {"versions": versions()}


def correlation(cells: list[dict[str, Any]], x: str, y: str) -> float:
    """Spearman's correlation within each training size, averaged over the sizes' cells."""
    sizes = sorted({cell["num_train"] for cell in cells})
    groups = [[cell for cell in cells if cell["num_train"] == size] for size in sizes]
    values, weights = [], []
    for group in groups:
        xs, ys = [c[x] for c in group], [c[y] for c in group]
        if len(set(xs)) > 1 and len(set(ys)) > 1:
            values.append(float(spearmanr(xs, ys).statistic))
            weights.append(len(group))
    return float(np.average(values, weights=weights)) if values else float("nan")


def interval(cells: list[dict[str, Any]], x: str, y: str) -> tuple[float, float]:
    """95% percentile interval of `correlation` over bootstrap samples within each size."""
    generator = np.random.default_rng(0)
    sizes = sorted({cell["num_train"] for cell in cells})
    groups = [[cell for cell in cells if cell["num_train"] == size] for size in sizes]
    estimates = []
    for _ in range(NUM_RESAMPLES):
        sample = [
            group[i] for group in groups for i in generator.integers(len(group), size=len(group))
        ]
        estimates.append(correlation(sample, x, y))
    low, high = np.nanpercentile(estimates, [2.5, 97.5])
    return float(low), float(high)


def write_page(cells: list[dict[str, Any]]) -> None:
    """The table of correlations, every cell, and the picture."""
    by = {method: [c for c in cells if c["method"] == method] for method in ("lora", "bara")}
    lines = [
        "# Rank and the generalisation gap",
        "",
        "Made by `python benchmarks/rank_and_gap.py --analyse` from "
        "`benchmarks/results/rank_and_gap.jsonl`; do not edit.",
        "",
        f"{len(cells)} adapters of MiniLM-L6 on tweets, {cells[0]['steps']} steps each, "
        f"lora_alpha = 2 r. Gap: test ({cells[0]['num_test']} texts) minus training (at most "
        f"{NUM_SEEN} of its texts); s_bar is that of these training texts. Spearman's correlation "
        "within each training size, averaged over sizes; 95% bootstrap intervals over cells. With "
        "so few cells an interval is wide, and a cell's own noise is in it.",
        "",
        "![The gap against the effective and the maximum rank](images/rank-and-gap.png)",
        "",
        "| gap | BaRA, with s_bar | BaRA, with r | LoRA, with r |",
        "|---|---|---|---|",
    ]
    for gap, name in GAPS.items():
        row = []
        for method, x in (("bara", "s_bar"), ("bara", "r"), ("lora", "r")):
            low, high = interval(by[method], x, gap)
            row.append(f"{correlation(by[method], x, gap):+.2f} ({low:+.2f} to {high:+.2f})")
        lines.append(f"| {name} | {' | '.join(row)} |")
    columns = ["s_bar", "train_nll_mean", "test_nll_mean", "gap_nll_mean", "gap_error_mean"]
    columns += ["gap_nll_mixture", "gap_error_mixture"]
    keys = ["method", "prior", "num_train", "r", "seed"]
    lines += [
        "",
        "LoRA has no draws: its mixture is its mean. BaRA's objective is not today's default but "
        f"{OBJECTIVE}. Priors: "
        + "; ".join(f"{name} {values or ''}".strip() for name, values in PRIORS.items())
        + ".",
        "",
        f"| method | prior | texts | r | seed | {' | '.join(columns)} |",
        "|---" * (5 + len(columns)) + "|",
    ]
    for c in sorted(cells, key=lambda c: [c[key] for key in keys]):
        names = [str(c[key]) for key in keys]
        lines.append(f"| {' | '.join(names + [f'{c[name]:.3f}' for name in columns])} |")
    atomic_write_text(PAGE, "\n".join(lines) + "\n")
    save_figure(picture(by), PICTURE)


def picture(by: dict[str, list[dict[str, Any]]]) -> Figure:
    """The gap in NLL against s_bar and against r, by training size."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    sizes = sorted({c["num_train"] for cells in by.values() for c in cells})
    for ax, x, label in zip(
        axes, ("s_bar", "r"), ("effective rank", "maximum rank r"), strict=True
    ):
        for method, marker in (("bara", "o"), ("lora", "x")):
            for size, colour in zip(sizes, LIGHT.series, strict=False):
                cells = [c for c in by[method] if c["num_train"] == size]
                xs, ys = [c[x] for c in cells], [c["gap_nll_mean"] for c in cells]
                name = {"bara": "BaRA", "lora": "LoRA"}[method]
                ax.scatter(xs, ys, marker=marker, color=colour, s=26, label=f"{name}, {size} texts")
        ax.set_xscale("log", base=2)
        ax.set_xlabel(label)
        ax.grid(color=LIGHT.grid, lw=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
    axes[0].set_ylabel("test NLL − training NLL (mean)")
    figure.legend(
        *axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=7.5, frameon=False
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--num-test", type=int, default=NUM_TEST)
    parser.add_argument("--num-draws", type=int, default=4)
    parser.add_argument("--shard", default="0/1", help="i/n: run every n-th cell, from the i-th")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--analyse", action="store_true", help="write the page; train nothing")
    arguments = parser.parse_args()
    if arguments.analyse:
        write_page(read_lines(arguments.results))
        return
    quieten_libraries()
    index, count = map(int, arguments.shard.split("/"))
    for cell in grid(arguments.ranks, arguments.sizes, arguments.seeds)[index::count]:
        key = {**cell._asdict(), "steps": arguments.steps}
        if any(key.items() <= done.items() for done in read_lines(arguments.results)):
            continue
        result = run_cell(cell, arguments.steps, arguments.num_test, arguments.num_draws)
        append_row(arguments.results, result)
        print(f"{cell}: s_bar {result['s_bar']:.2f}, gap {result['gap_nll_mean']:.3f}", flush=True)


if __name__ == "__main__":
    main()
