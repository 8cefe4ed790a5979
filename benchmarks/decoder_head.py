"""A language model as a classifier, the usual way: a decoder with a head on its last token.

    python benchmarks/decoder_head.py [--analyse]

`AutoModelForSequenceClassification` on SmolLM2-135M with `transformers.Trainer`, 300 texts, 10
epochs. The head's input varies by about 1, so that it learns four times as quickly as BaRA's
default for encoders would have it on these features. Asked before the runs: with the head at that
pace (0.25), is BaRA's NLL lower than with the head as PEFT trains it, and is it below LoRA's? Each
finished run is written to benchmarks/results/decoder_head.jsonl at once and not made again; the
table goes to docs/results/development/decoder-head.md.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from bara.bench.results import append_row, read_lines
from first_token import METRICS, ROOT, Cell, run, table
from language_models import as_folder
from pages import write_between

RESULTS = ROOT / "benchmarks/results/decoder_head.jsonl"
PAGE = ROOT / "docs/results/development/decoder-head.md"
TASKS = ("tweet_eval_emotion",)
SEEDS = (10,)
RUNS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "BaRA": {},
    "BaRA, head at 0.25": {"head_input_std": 0.25},
}
TRAINING = {"num_train_epochs": 10, "learning_rate": 5e-4, "per_device_train_batch_size": 16}
TARGETS = ("q_proj", "k_proj", "v_proj")


def main() -> None:
    rows: dict[Cell, dict[str, Any]]
    rows = {(row["task"], row["run"], row["seed"]): row for row in read_lines(RESULTS)}
    missing = [cell for cell in product(TASKS, RUNS, SEEDS) if cell not in rows]
    if missing and "--analyse" not in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            base = as_folder(Path(folder))
            for task, name, seed in missing:
                more = {"base": base, "targets": TARGETS, **TRAINING}
                row = rows[task, name, seed] = run(name, task, seed, RUNS[name], **more)
                append_row(RESULTS, row)
                shown = {metric: round(row[metric], 3) for metric in METRICS}
                print(name, task, seed, shown, flush=True)
    text = table(rows, TASKS, tuple(RUNS), SEEDS)
    write_between(PAGE, "decoder head", f"\n{text}")


if __name__ == "__main__":
    main()
