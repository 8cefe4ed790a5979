"""The plain PEFT path on a sentence encoder: a head on the first token, which it never trained.

    python benchmarks/first_token.py [--analyse]

`AutoModelForSequenceClassification` on MiniLM with `transformers.Trainer`, 300 texts of three
development tasks, 20 epochs. The head's input hardly varies, so that the head learns slowly. Does
BaRA's default for such a head (left slow, with KL and noise on A that wait, where a linear head
makes little of the features but not nothing; quicker where it makes nothing) bring its accuracy and
NLL to LoRA's? The default was found with seeds 10 and 11; 12 is for the answer alone. Each finished
run is written to benchmarks/results/first_token.jsonl at once and not made again; the table goes to
docs/results/development/first-token.md.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import bara
from bara.bench.results import append_row, read_lines
from bara.bench.tasks import load_task
from bara.data.examples import minilm_path
from bara.data.text_task import TextTask
from bara.evaluation.metrics import classification_metrics
from bara.machine import fast_bfloat16, versions
from pages import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/first_token.jsonl"
PAGE = ROOT / "docs/results/development/first-token.md"
DATA = ROOT.parent / "shared/data"
TASKS = ("tweet_eval_emotion", "tweet-sentiment", "tweet_eval_irony")
SEEDS = (10, 11, 12)
RUNS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "BaRA": {},
    "BaRA, head at 0.2": {"head_input_std": 0.2},
}
"""Options of the config."""
TRAINING = {"num_train_epochs": 20, "learning_rate": 1e-3, "per_device_train_batch_size": 32}
METRICS = ("accuracy", "nll", "ece")
Cell = tuple[str, str, int]
"""Task, run and seed."""


def run(
    name: str,
    task: str,
    seed: int,
    options: dict[str, Any],
    *,
    base: Path | None = None,
    targets: Sequence[str] = ("query", "key", "value"),
    **training: Any,
) -> dict[str, Any]:
    """One training run, measured on 400 held-out texts.

    Args:
        name: what the row is called; LoRA where it begins so, else BaRA.
        task, seed: the texts, and the start.
        options: of the config.
        base, targets: the model's folder, MiniLM's by default, and the layers that are adapted.
        **training: arguments of the training.
    """
    base = base or minilm_path()
    train, _, test = load_task(task, str(DATA)).sample(300, 150, 400, seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    text_task = TextTask.infer(train)
    train, test = (text_task.inputs(table, tokenizer) for table in (train, test))
    set_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(set(train["labels"]))
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    lora = name.startswith("LoRA")
    config = LoraConfig if lora else bara.BaraConfig
    adapter = {"r": 8, "lora_alpha": 16, "target_modules": list(targets)}
    model = get_peft_model(model, config(task_type="SEQ_CLS", **adapter, **options))
    bf16 = fast_bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            warmup_steps=0.06,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=bf16,
            seed=seed,
            **training,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=train,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[] if lora else [bara.BayesianCallback()],
        )
        trainer.train()
    collate = DataCollatorWithPadding(tokenizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        predictive = bara.predict(model, test, collate_fn=collate, seed=seed, progress=False)
    metrics = classification_metrics(predictive)  # type: ignore[arg-type]
    return {"run": name, "task": task, "seed": seed, "versions": versions(), **metrics}


def table(
    rows: dict[Cell, dict[str, Any]],
    tasks: Sequence[str] = TASKS,
    runs: Sequence[str] = tuple(RUNS),
    seeds: Sequence[int] = SEEDS,
) -> str:
    """The means over the seeds that have every run, as Markdown."""
    whole = [s for s in seeds if all((*cell, s) in rows for cell in product(tasks, runs))]
    lines = ["| task | run | accuracy | NLL | ECE |", "|---|---|---|---|---|"]
    for task, name in [*product(tasks, runs), *product([None], runs)]:
        mine = [rows[t, name, s] for t in ([task] if task else tasks) for s in whole]
        numbers = [f"{fmean(row[metric] for row in mine):.3f}" for metric in METRICS]
        lines.append(f"| {' | '.join([task or 'mean', name, *numbers])} |")
    lines += ["", f"Means over the seeds {', '.join(map(str, whole))}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = {(row["task"], row["run"], row["seed"]): row for row in read_lines(RESULTS)}
    for task, name, seed in product(TASKS, RUNS, SEEDS):
        if (task, name, seed) not in rows and "--analyse" not in sys.argv:
            row = rows[task, name, seed] = run(name, task, seed, RUNS[name], **TRAINING)
            append_row(RESULTS, row)
            print(name, task, seed, {metric: round(row[metric], 3) for metric in METRICS})
    write_between(PAGE, "first token", f"\n{table(rows)}")


if __name__ == "__main__":
    main()
