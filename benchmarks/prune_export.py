"""What pruning and export change, for the quickstart's BaRA adapter: the numbers of docs.

    bara quickstart
    python benchmarks/prune_export.py bara-quickstart/bara

Prunes the adapter at several thresholds and exports it, on the first 60 test tweets; the change is
measured on the next 60. Each finished cell is written to benchmarks/results/prune_export.json at
once and not made again; the table goes to docs/ranks-and-export.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bara
from bara.data.examples import load_sentiment
from bara.files import atomic_write_text
from bara.finetuning.load import load_adapter
from bara.machine import versions
from pages import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/prune_export.json"
DOCS = ROOT / "docs/ranks-and-export.md"
MARK = "benchmark"
THRESHOLDS = (0.2, 0.5, 0.9)
TEXTS = 60
DRAWS = 5


def cell(results: dict[str, Any], name: str, make: Callable[[], Any]) -> None:
    """Makes a cell of the results unless it is there, and writes the file."""
    if name not in results:
        results[name] = make()
        print(name, json.dumps(results[name])[:300], flush=True)
        atomic_write_text(RESULTS, json.dumps(results, indent=2) + "\n")


def prune_cell(model: Any, fit: Any, held_out: Any, threshold: float) -> dict[str, Any]:
    """The summary of one pruning."""
    pruning = bara.prune(
        model, fit, threshold=threshold, held_out=held_out, num_draws=DRAWS, progress=False
    )
    result = pruning.to_dict()
    inclusion = torch.cat(list(pruning.inclusion.values()))
    result["inclusion"] = {"min": inclusion.min().item(), "mean": inclusion.mean().item()}
    result["factors"] = len(inclusion)
    result["emptied_layers"] = sum(not kept for kept in pruning.kept.values())
    del result["kept"]
    return result


def export_cell(model: Any, fit: Any, held_out: Any, mode: Any) -> dict[str, Any]:
    """Size of one export and its distance to the original."""
    with tempfile.TemporaryDirectory() as folder:
        export = bara.export_lora(
            model,
            Path(folder) / "export",
            mode=mode,
            data=fit,
            held_out=held_out,
            num_draws=DRAWS,
            progress=False,
        )
    assert export.difference is not None
    return {"bytes": export.bytes, "difference": export.difference.to_dict()}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| | factors left | parameters | ms | mean output | mixture of draws |"]
    lines.append("|---|---|---|---|---|---|")
    noise = "–"
    for threshold in THRESHOLDS:
        result = results[f"prune-{threshold:g}"]
        change = result["change"]
        left = f"{result['factors'] - result['removed']} of {result['factors']}"
        parameters = "{:,} → {:,}".format(*result["parameters"])
        times = "{:.0f} → {:.0f}".format(*change["milliseconds"])
        noise = f"{change['draws_before']['mean']:.3f}"
        lines.append(
            f"| prune, threshold {threshold:g} | {left} | {parameters} | {times} "
            f"| {change['mean']['mean']:.4f} | {change['draws']['mean']:.4f} |"
        )
    mean, draws = (results[f"export-{m}"]["difference"]["mean"] for m in ("mean", "draws"))
    lines.append(f"| export, mean | | | | {mean:.4f} | |")
    lines.append(f"| export, {DRAWS} draws | | | | | {draws:.4f} |")
    inclusion = results[f"prune-{THRESHOLDS[0]:g}"]["inclusion"]
    return "\n".join(lines) + (
        "\n\nThe quickstart's BaRA adapter (300 tweets, 20 epochs): mean total variation distance "
        f"of the class probabilities on {TEXTS} held-out tweets. Two mixtures of {DRAWS} draws of "
        f"the original are {noise} apart. Its smallest inclusion is {inclusion['min']:.3f} (mean "
        f"{inclusion['mean']:.3f}). Parameters include the head. Milliseconds are of one pass of "
        "all held-out tweets, before and after, on two cores that other work kept busy. "
        "`python benchmarks/prune_export.py` writes this table.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    adapter = parser.parse_args().adapter
    data = load_sentiment(300, 600, num_validation=0, seed=0)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = versions()
    model, tokenizer, task = load_adapter(adapter, device="cpu")
    inputs = task.inputs(data.test, tokenizer, labels=False)
    fit, held_out = inputs.select(range(TEXTS)), inputs.select(range(TEXTS, 2 * TEXTS))
    for mode in ("mean", "draws"):
        cell(results, f"export-{mode}", partial(export_cell, model, fit, held_out, mode))
    for threshold in THRESHOLDS:
        make = partial(prune_cell, model, fit, held_out, threshold)
        cell(results, f"prune-{threshold:g}", make)
    write_between(DOCS, MARK, table(results).rstrip("\n"))


if __name__ == "__main__":
    main()
