"""SmolLM2-135M-Instruct on multiple choice from 500 questions: LoRA against BaRA and BaLoRA.

    python benchmarks/language_models.py --data FOLDER

FOLDER holds arc_easy/{train,test}.jsonl and openbookqa/{train,test}.jsonl with `question`,
`choices` and `answer`. Every finished cell is written to benchmarks/results/language_models.jsonl
at once; a second run goes on where the first stopped. The table goes to
docs/language-models-results.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from bara.bench.results import append_row, read_lines
from bara.data.tables import load_table
from bara.evaluation.metrics import classification_metrics
from bara.files import atomic_write_text
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.language.multiple_choice import multiple_choice
from bara.language.tasks import LanguageTask, questions
from bara.machine import fast_bfloat16, quieten_libraries, versions
from bara.methods.recipe import TrainRecipe
from bara.models.base import load_causal_lm, load_tokenizer
from bara.models.gguf import smollm2_path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/language_models.jsonl"
TABLE = ROOT / "docs/language-models-results.md"
DATASETS = {"arc_easy": "ARC-Easy", "openbookqa": "OpenBookQA"}
METHODS = {"lora": "LoRA", "bara": "BaRA", "balora": "BaLoRA"}
METHOD_OPTIONS: dict[str, dict[str, float]] = {
    "bara": {"kl_weight": 6 / 90, "local_kl_weight": 0.003, "weight_noise": 0.0},
    "balora": {"dropout_prior": 0.1, "kl_weight": 0.01},
}
"""What were the defaults when the cells were made; less noise than by default today."""
METRICS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE",
    "aurc": "AURC",
    "seconds": "seconds",
}


def run_cell(arguments: argparse.Namespace, base: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """Trains one method on one data set and seed, and measures it; seconds are of training."""
    folder = arguments.data / cell["dataset"]
    train = load_table(folder / "train.jsonl").shuffle(seed=cell["seed"])
    test = load_table(folder / "test.jsonl").shuffle(seed=0)
    with tempfile.TemporaryDirectory() as output:
        recipe = TrainRecipe(
            model=str(base),
            output=output,
            task="multiple-choice",
            scoring=cell["scoring"],
            method=cell["method"],
            method_options=METHOD_OPTIONS.get(cell["method"], {}),
            training={
                "num_train_epochs": cell["epochs"],
                "save_strategy": "no",
                "bf16": fast_bfloat16(),
                "use_cpu": not torch.cuda.is_available(),
            },
            max_length=256,
            seed=cell["seed"],
        )
        start = time.perf_counter()
        finetune(recipe, train.select(range(min(cell["num_train"], len(train)))), overwrite=True)
        seconds = time.perf_counter() - start
        model, tokenizer, task = load_adapter(output)
        assert isinstance(task, LanguageTask)
        start = time.perf_counter()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bfloat16()):
            predictive = multiple_choice(
                model,
                tokenizer,
                questions(test.select(range(min(cell["num_test"], len(test))))),
                scoring=task.scoring,
                num_draws=cell["num_draws"],
                seed=cell["seed"],
            )
        answering = time.perf_counter() - start
    metrics = classification_metrics(predictive)
    return {**cell, **metrics, "seconds": seconds, "answering": answering, "versions": versions()}


def as_folder(folder: Path) -> Path:
    """SmolLM2 as safetensors: a GGUF file is unpacked anew whenever it is loaded."""
    model = load_causal_lm(str(smollm2_path()), {"dtype": "float32"})
    load_tokenizer(str(smollm2_path()), model).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def is_same(settings: dict[str, Any], cell: dict[str, Any]) -> bool:
    """Whether a cell was made with these settings."""
    return all(cell[name] == value for name, value in settings.items())


def write_table(cells: list[dict[str, Any]], table: Path) -> None:
    """Means over seeds with standard errors."""
    heading = " | ".join(METRICS.values())
    first = cells[0]
    lines = [
        "# SmolLM2-135M on multiple choice",
        "",
        "Made by `python benchmarks/language_models.py` from "
        "`benchmarks/results/language_models.jsonl`; do not edit.",
        "",
        f"{first['num_train']} training questions, {first['num_test']} test questions, "
        f"{first['epochs']:g} epochs, {first['num_draws']} draws, choices scored by their "
        f"{first['scoring']}; seconds of training. Mean ± standard error over seeds.",
        "",
        f"| | | seeds | {heading} |",
        "|---" * (len(METRICS) + 3) + "|",
    ]
    for dataset, title in DATASETS.items():
        for method, name in METHODS.items():
            mine = [c for c in cells if (c["dataset"], c["method"]) == (dataset, method)]
            if mine:
                numbers = [_cell([c[metric] for c in mine], metric) for metric in METRICS]
                lines.append(f"| {title} | {name} | {len(mine)} | {' | '.join(numbers)} |")
    atomic_write_text(table, "\n".join(lines) + "\n")


def _cell(values: list[float], metric: str) -> str:
    digits = 0 if metric == "seconds" else 3
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-train", type=int, default=500)
    parser.add_argument("--num-test", type=int, default=400)
    parser.add_argument("--num-draws", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--scoring", default="text")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    quieten_libraries()
    names = ("num_train", "num_test", "num_draws", "epochs", "scoring")
    settings = {name: getattr(arguments, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        base = None
        for seed in arguments.seeds:
            for dataset in arguments.datasets:
                for method in arguments.methods:
                    cell = {"dataset": dataset, "method": method, "seed": seed, **settings}
                    if any(is_same(cell, done) for done in read_lines(arguments.results)):
                        continue
                    base = base or as_folder(Path(folder))
                    done = run_cell(arguments, base, cell)
                    append_row(arguments.results, done)
                    numbers = " ".join(f"{key} {done[key]:.3f}" for key in METRICS)
                    print(f"{dataset} {method} seed {seed}: {numbers}", flush=True)
    cells = [c for c in read_lines(arguments.results) if is_same(settings, c)]
    write_table(cells, arguments.table)


if __name__ == "__main__":
    main()
