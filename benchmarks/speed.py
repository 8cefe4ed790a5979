"""Training step, memory and prediction of every method, as ratios to PEFT's LoRA.

    python benchmarks/speed.py

Interleaved: a round trains every method for some steps on the same batches and predicts with it,
then comes the next round. A ratio is the median over rounds and steps of a step's time over that of
LoRA on the same batch in the same round. Each method's peak memory is measured in a process of its
own. Every finished round and memory is written to benchmarks/results/speed.jsonl at once; a second
run goes on where the first stopped. The tables go to docs/speed.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from bara.bench.models import MODELS, Fitted, fit
from bara.bench.results import append_row, read_lines
from bara.bench.spec import Benchmark
from bara.bench.tasks import Splits, load_task
from bara.cli.terminal import quieten_libraries
from bara.errors import BaraError
from bara.files import atomic_write_text
from bara.methods import METHODS
from bara.quickstart import versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/speed.jsonl"
PAGE = ROOT / "docs/speed.md"
TASK = "tweet-sentiment"
NUM_PREDICT = {"minilm": 64, "smollm2": 8}
"""Texts to predict; a language model reads each as a question with three choices."""
BATCH = {"minilm": 32, "smollm2": 8}
"""Texts in a batch of training: the defaults."""
MAX_LENGTH = {"minilm": 64, "smollm2": 128}
BASELINE = "lora"
NUM_DRAWS = 10
OPTIONS: dict[str, dict[str, Any]] = {"bara": {"weight_noise": 1.0}}
"""By default so few steps would have no noise on A; its size is nothing to its time."""
WARM_UP = 2
"""Steps at the start of a training run that are not counted."""


class StepTimer(TrainerCallback):
    """Seconds of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def train(
    model: str, method: str, splits: Splits, steps: int, callback: TrainerCallback, folder: str
) -> Fitted:
    """Trains with the quickstart's settings, for some steps."""
    training = {"max_steps": steps + WARM_UP, "logging_strategy": "no"}
    benchmark = Benchmark(
        "speed",
        model,
        [TASK],
        [method],
        training=training,
        method_options=OPTIONS.get(method, {}),
        max_length=MAX_LENGTH[model],
    )
    return fit(next(benchmark.cells()), splits, Path(folder), [callback])


def run_method(model: str, method: str, splits: Splits, steps: int) -> dict[str, Any]:
    """Seconds of every step, of the draws, and of as many passes of the mean."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        fitted = train(model, method, splits, steps, timer, folder)

        def means() -> None:
            for _ in range(NUM_DRAWS):
                fitted.predict(splits.test, deterministic=True)

        return {
            "steps": timer.seconds[WARM_UP : WARM_UP + steps],
            "draws": timed(lambda: fitted.predict(splits.test, num_draws=NUM_DRAWS)),
            "forwards": timed(means),
        }


def run_round(model: str, methods: list[str], steps: int) -> dict[str, dict[str, Any]]:
    """Every method once; one that this model cannot have is left out."""
    splits, times = load_data(model), {}
    for method in methods:
        try:
            times[method] = run_method(model, method, splits, steps)
            print(f"{model}: {method}", flush=True)
        except BaraError as error:
            if method == BASELINE:
                raise
            print(f"{model}: {method} is left out: {error}", flush=True)
    return times


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def training_memory(model: str, method: str, splits: Splits, steps: int) -> float:
    """MiB that training takes above what the process held before, at its peak (Linux only)."""

    class Reset(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
            self.before = status("VmRSS")

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.peak = status("VmHWM")

    reset = Reset()
    with tempfile.TemporaryDirectory() as folder:
        train(model, method, splits, steps, reset, folder)
    return (reset.peak - reset.before) / 2**10


def status(name: str) -> int:
    """A number of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def load_data(model: str) -> Splits:
    """Tweets to train on, as many held out and some to predict; for a language model as questions,
    with the sentiments as choices."""
    count = NUM_PREDICT[model]
    train, validation, test = load_task(TASK).sample(320, count, count, seed=0)
    assert validation is not None
    if model == "smollm2":
        train, validation, test = map(as_questions, (train, validation, test))
    return Splits(train, test, validation)


def as_questions(table: Dataset) -> Dataset:
    """Multiple choice among the classes."""
    names = table.features["label"].names
    return Dataset.from_dict(
        {
            "question": [f"What is the sentiment of: {text}" for text in table["text"]],
            "choices": [names] * len(table),
            "answer": list(table["label"]),
        }
    )


def summary(
    rounds: list[dict[str, dict[str, Any]]], memory: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Every method's row, by its name."""
    rows = {}
    for method in sorted(
        set.intersection(*(set(times) for times in rounds)), key=list(METHODS).index
    ):
        own, plain = ([times[m] for times in rounds] for m in (method, BASELINE))
        steps = [s for times in own for s in times["steps"]]
        rows[method] = {
            "step_ms": 1e3 * median(steps),
            "step_ratio": ratio([t["steps"] for t in own], [t["steps"] for t in plain]),
            "memory_mib": memory[method],
            "memory_ratio": memory[method] / memory[BASELINE],
            "draws_s": median(t["draws"] for t in own),
            "draws_ratio_lora_forwards": median(
                ours["draws"] / theirs["forwards"] for ours, theirs in zip(own, plain, strict=True)
            ),
            "draws_ratio_own_forwards": median(t["draws"] / t["forwards"] for t in own),
        }
    return rows


def ratio(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """The median ratio of the same step in the same round."""
    return median(
        a / b
        for own, plain in zip(ours, theirs, strict=True)
        for a, b in zip(own, plain, strict=False)
    )


def memory_in_child(model: str, method: str, steps: int) -> float:
    """`training_memory` in a process of its own; NaN where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    command = [sys.executable, __file__, "--memory", model, method, "--steps", str(steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def write_page(records: list[dict[str, Any]], page: Path) -> None:
    """The tables of docs/speed.md."""
    first = records[0]
    lines = [
        "# Speed and memory",
        "",
        "Made by `python benchmarks/speed.py` from `benchmarks/results/speed.jsonl`; do not edit.",
        "",
        "All methods interleaved in every round, r = 8; a ratio is the median over rounds and "
        "steps, every step against LoRA's on the same batch of the same round. Memory is what "
        "training takes above the loaded model, of one run each: what loading has left with the "
        "allocator counts for nothing, so that a single number can be far too low. Prediction is "
        f"{NUM_DRAWS} draws, against {NUM_DRAWS} passes of LoRA and against {NUM_DRAWS} passes of "
        "the method's own mean mode.",
        "",
        f"{first['versions']['machine']}, {first['versions']['precision']}, torch "
        f"{first['versions']['torch']}.",
    ]
    for model in MODELS:
        mine = [r for r in records if r["model"] == model]
        rounds = [r["times"] for r in mine if "times" in r]
        memory = {r["method"]: r["memory_mib"] or float("nan") for r in mine if "memory_mib" in r}
        rounds = [{m: t for m, t in times.items() if m in memory} for times in rounds]
        if not rounds or BASELINE not in memory:
            continue
        steps = len(rounds[0][BASELINE]["steps"])
        lines += [
            "",
            f"## {model}",
            "",
            f"{len(rounds)} rounds of {steps} steps of {BATCH[model]} tweets; {NUM_PREDICT[model]} "
            "tweets are predicted.",
            "",
            "| | step, ms | step / LoRA | memory, MiB | memory / LoRA | prediction, s | "
            "/ LoRA's passes | / own passes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {method} | {row['step_ms']:.0f} | {row['step_ratio']:.2f} | "
            f"{row['memory_mib']:.0f} | {row['memory_ratio']:.2f} | {row['draws_s']:.2f} | "
            f"{row['draws_ratio_lora_forwards']:.2f} | {row['draws_ratio_own_forwards']:.2f} |"
            for method, row in summary(rounds, memory).items()
        ]
    atomic_write_text(page, "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "METHOD"), help="for its own use")
    arguments = parser.parse_args()
    quieten_libraries()
    if arguments.memory:
        model, method = arguments.memory
        print(training_memory(model, method, load_data(model), arguments.steps))
        return
    methods = [BASELINE, *(m for m in arguments.methods if m != BASELINE)]

    def keep(record: dict[str, Any]) -> None:
        append_row(arguments.output, record | {"versions": versions()})
        write_page(read_lines(arguments.output), arguments.page)

    for model in arguments.models:
        mine = [r for r in read_lines(arguments.output) if r["model"] == model]
        rounds = [r["times"] for r in mine if "times" in r]
        while len(rounds) < arguments.rounds:
            rounds.append(run_round(model, methods, arguments.steps))
            keep({"model": model, "times": rounds[-1]})
        known = {r["method"] for r in mine if "memory_mib" in r}
        for method in rounds[0]:
            if method not in known:
                mib = memory_in_child(model, method, arguments.steps)
                keep({"model": model, "method": method, "memory_mib": mib})


if __name__ == "__main__":
    main()
