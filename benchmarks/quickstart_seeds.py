"""The quickstart's comparison over several seeds: each seed has its own texts and training.

    python benchmarks/quickstart_seeds.py

Every finished cell is written to benchmarks/results/quickstart_seeds.jsonl at once; a second run
goes on where the first stopped. The table goes to docs/quickstart-results.md and into the README.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from bara.bench.results import append_row, read_lines
from bara.data.examples import load_news, load_sentiment
from bara.files import atomic_write_text
from bara.finetuning.load import load_adapter
from bara.machine import quieten_libraries, versions
from bara.posteriors.bara import LOGIT_SCALE, OPEN, BaraPosterior
from bara.posteriors.distributions import open_logit
from bara.quickstart import METHODS, run_method
from pages import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/quickstart_seeds.jsonl"
TABLE = ROOT / "docs/quickstart-results.md"
README = ROOT / "README.md"
NUM_TEST = 2000
"""The quickstart's 600 test texts leave an error of 2 points in one seed's paired difference."""
METRICS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
    "ood_auroc": "OOD AUROC",
    "s_bar": "s_bar",
}


def run_cell(method: str, seed: int, epochs: float) -> dict[str, Any]:
    """Trains and measures one method on one seed."""
    data = load_sentiment(300, NUM_TEST, num_validation=0, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / method
        trained = run_method(
            method,
            adapter,
            data.train,
            data.test,
            load_news(300, seed=seed),
            epochs=epochs,
            seed=seed,
            progress=False,
        )
        cell = {"seed": seed, "epochs": epochs, "key": method, "num_test": NUM_TEST, **trained.row}
        if trained.rank is not None:
            cell["rank_per_layer"] = [round(v, 3) for v in trained.rank.per_layer.tolist()]
            cell["rank_layers_sd"] = float(trained.rank.per_layer.std())
            cell["rank_inputs_sd"] = float(trained.rank.per_input.std())
            cell["rank_inputs_range"] = [
                float(trained.rank.per_input.min()),
                float(trained.rank.per_input.max()),
            ]
        cell |= gate_movement(adapter)
    return cell | {"versions": versions()}


@torch.no_grad()
def gate_movement(adapter: Path) -> dict[str, float]:
    """Inclusion probabilities of the task's gates now, and how far their logits have moved."""
    model, _, _ = load_adapter(adapter)
    posteriors = [m for m in model.modules() if isinstance(m, BaraPosterior)]
    if not posteriors:
        return {}
    logits = torch.cat([LOGIT_SCALE * p.global_logit for p in posteriors])
    opened = torch.sigmoid(open_logit(logits))
    return {
        "inclusion_start": float(torch.sigmoid(open_logit(torch.tensor(OPEN)))),
        "inclusion_min": float(opened.min()),
        "inclusion_mean": float(opened.mean()),
        "inclusion_max": float(opened.max()),
        "gate_logit_moved": float((logits - OPEN).abs().mean()),
    }


def write_table(cells: list[dict[str, Any]], epochs: float) -> None:
    """Means over seeds with standard errors, the differences, and every seed's numbers."""
    cells = [c for c in cells if c["epochs"] == epochs and c["num_test"] == NUM_TEST]
    by = {key: {c["seed"]: c for c in cells if c["key"] == key} for key in METHODS}
    seeds = sorted(set.intersection(*(set(cells) for cells in by.values())))
    if not seeds:
        return

    def values(key: str, metric: str) -> list[float]:
        return [by[key][seed][metric] for seed in seeds]

    def cell(numbers: list[float]) -> str:
        error = stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0
        digits = 0 if abs(mean(numbers)) > 20 else 3
        return f"{mean(numbers):.{digits}f} ± {error:.{digits}f}"

    heading = " | ".join(METRICS.values())
    lines = [
        "# The quickstart over seeds",
        "",
        f"Made by `python benchmarks/quickstart_seeds.py --epochs {epochs:g}` from "
        "`benchmarks/results/quickstart_seeds.jsonl`; do not edit.",
        "",
        f"Mean ± standard error over {len(seeds)} seeds, each with its own 300 training and "
        f"{NUM_TEST} test tweets and 300 news texts; MiniLM-L6, r = 8, {epochs:g} epochs, "
        "10 draws.",
        "",
        f"| | {heading} |",
        "|---" * (len(METRICS) + 1) + "|",
    ]
    for key, name in METHODS.items():
        row = " | ".join(cell(values(key, metric)) for metric in METRICS)
        lines.append(f"| {name} | {row} |")
    summary = lines[-2 - len(METHODS) :]
    nll = 1 - mean(values("bara", "nll")) / mean(values("lora", "nll"))
    ece = mean(values("bara", "ece")) / mean(values("lora", "ece"))
    gained = [
        b - a for a, b in zip(*(values(k, "accuracy") for k in ("lora", "bara")), strict=True)
    ]
    bara = [by["bara"][seed] for seed in seeds]
    lines += [
        "",
        f"- NLL: BaRA's is {nll:.0%} below LoRA's. ECE: {ece:.2f} of LoRA's.",
        f"- NLL: BaRA's is {1 - mean(values('bara', 'nll')) / mean(values('probe', 'nll')):.0%} "
        "below that of the probe, logistic regression on the frozen model's features.",
        f"- Accuracy: BaRA's minus LoRA's {100 * mean(gained):+.1f} points "
        f"(± {100 * stdev(gained) / len(gained) ** 0.5 if len(gained) > 1 else 0:.1f}).",
        f"- Effective rank: the layers' means differ by a standard deviation of "
        f"{mean(c['rank_layers_sd'] for c in bara):.2f}, the inputs' by "
        f"{mean(c['rank_inputs_sd'] for c in bara):.3f} (lowest to highest input "
        f"{mean(c['rank_inputs_range'][0] for c in bara):.2f} to "
        f"{mean(c['rank_inputs_range'][1] for c in bara):.2f}).",
        f"- Gates: the task's gates started at P(z > 0) = {bara[0]['inclusion_start']:.2f} and "
        f"ended between {min(c['inclusion_min'] for c in bara):.2f} and "
        f"{max(c['inclusion_max'] for c in bara):.2f}, on average at "
        f"{mean(c['inclusion_mean'] for c in bara):.2f}; their logits moved by "
        f"{mean(c['gate_logit_moved'] for c in bara):.2f}.",
        "",
        f"| seed | | {heading} |",
        "|---" * (len(METRICS) + 2) + "|",
    ]
    for seed in seeds:
        for key, name in METHODS.items():
            row = " | ".join(f"{by[key][seed][metric]:.3f}" for metric in METRICS)
            lines.append(f"| {seed} | {name} | {row} |")
    atomic_write_text(TABLE, "\n".join(lines) + "\n")
    put_into_readme(
        summary,
        f"Mean ± standard error over {len(seeds)} seeds of the quickstart: sentiment of tweets "
        f"from 300 training texts, MiniLM-L6, maximum rank 8, {epochs:g} epochs; the OOD texts "
        "are BBC news. `python benchmarks/quickstart_seeds.py` writes this table.",
    )


def put_into_readme(table: list[str], caption: str) -> None:
    """Replaces what stands between the README's two marks."""
    write_between(README, "quickstart-table", "\n".join(["", *table, "", caption, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--epochs", type=float, default=20)
    arguments = parser.parse_args()
    quieten_libraries()
    for seed in arguments.seeds:
        for method in arguments.methods:
            done = {(c["key"], c["seed"], c["epochs"]) for c in read_lines(RESULTS)}
            if (method, seed, arguments.epochs) in done:
                continue
            cell = run_cell(method, seed, arguments.epochs)
            append_row(RESULTS, cell)
            print(f"{method} seed {seed}: NLL {cell['nll']:.3f} ECE {cell['ece']:.3f}", flush=True)
    write_table(read_lines(RESULTS), arguments.epochs)


if __name__ == "__main__":
    main()
