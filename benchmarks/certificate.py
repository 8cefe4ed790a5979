"""Certificates on real texts: train in the certified mode, certify, and test on other texts.

    python benchmarks/certificate.py

Every finished cell is appended to benchmarks/results/certificate.jsonl at once; a second run goes
on where the first stopped. The table goes into docs/certificates.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bara.bench.results import append_row, read_lines
from bara.bench.tasks import load_task
from bara.certificates.certificate import certify
from bara.data.examples import minilm_path
from bara.evaluation.evaluate import evaluate
from bara.finetuning.certified_prior import certification_rows
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.machine import fast_bfloat16, quieten_libraries, versions
from bara.methods.recipe import TrainRecipe
from bara.quickstart import MAX_LENGTH
from pages import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/certificate.jsonl"
DOCS = ROOT / "docs/certificates.md"
MARK = "certificate-table"
NUM_TEST = 600


def run_cell(setting: dict[str, Any]) -> dict[str, Any]:
    """Trains, certifies and tests one adapter; computes in bfloat16 where that is faster."""
    seed = setting["seed"]
    train, _, test_texts = load_task(setting["task"]).sample(
        setting["num_train"], 0, NUM_TEST, seed
    )
    with tempfile.TemporaryDirectory() as folder:
        recipe = TrainRecipe(
            model=str(minilm_path()),
            output=str(Path(folder) / "adapter"),
            method="certified",
            method_options={
                name: setting[name]
                for name in ("prior_fraction", "prior_std", "head_prior_std", "kl_weight")
            },
            training={
                "num_train_epochs": setting["epochs"],
                "learning_rate": setting["learning_rate"],
                "save_strategy": "no",
                "bf16": fast_bfloat16(),
                "use_cpu": not torch.cuda.is_available(),
            },
            max_length=MAX_LENGTH,
            seed=seed,
        )
        start = time.perf_counter()
        adapter = finetune(recipe, train)
        seconds = time.perf_counter() - start
        model, tokenizer, task = load_adapter(adapter)
        rows = certification_rows(train, task, adapter)
        test = task.inputs(test_texts, tokenizer)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bfloat16()):
            certificate = certify(
                model, task.inputs(rows, tokenizer), num_draws=setting["num_draws"], seed=seed
            )
            metrics = evaluate(model, test, num_draws=10, seed=seed, progress=False).metrics
            mean = evaluate(model, test, deterministic=True, progress=False).metrics
    return {
        **setting,
        **certificate.to_dict(),
        "test_error_mixture": 1 - metrics["accuracy"],
        "test_error_mean": 1 - mean["accuracy"],
        "seconds": seconds,
        "versions": versions(),
    }


def write_table(cells: list[dict[str, Any]]) -> None:
    """Puts the certificates between the marks in the docs."""
    lines = [
        "| | texts | for the prior | `kl_weight` | n | error, n texts | KL | bound | most frequent "
        "class | error, others |",
        "|---" * 10 + "|",
    ]
    columns = ("task", "num_train", "prior_fraction", "kl_weight")
    for cell in sorted(cells, key=lambda c: [c[name] for name in columns]):
        lines.append(
            f"| {cell['task']} | {cell['num_train']} | {cell['prior_fraction']:.0%} | "
            f"{cell['kl_weight']:g} | {cell['n']} | "
            f"{cell['gibbs_risk']:.3f} | {cell['kl']:.1f} | **{cell['bound']:.3f}** | "
            f"{cell['majority_error']:.3f} | {cell['test_error_mixture']:.3f} |"
        )
    write_between(DOCS, MARK, "\n".join(["", *lines, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["tweet-sentiment", "bbc-news"])
    parser.add_argument("--num-train", type=int, nargs="+", default=[1000])
    parser.add_argument("--prior-fractions", type=float, nargs="+", default=[0.5, 0.0])
    parser.add_argument("--kl-weights", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--prior-std", type=float, default=0.1)
    parser.add_argument("--head-prior-std", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--num-draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    quieten_libraries()
    axes = {
        "task": arguments.pop("tasks"),
        "num_train": arguments.pop("num_train"),
        "prior_fraction": arguments.pop("prior_fractions"),
        "kl_weight": arguments.pop("kl_weights"),
    }
    for values in product(*axes.values()):
        setting = dict(zip(axes, values, strict=True)) | arguments
        if any(setting.items() <= cell.items() for cell in read_lines(RESULTS)):
            continue
        cell = run_cell(setting)
        append_row(RESULTS, cell)
        print(f"{setting}: bound {cell['bound']:.3f}", flush=True)
    write_table(read_lines(RESULTS))


if __name__ == "__main__":
    main()
