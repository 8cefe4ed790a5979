"""Training step, memory and prediction of every method, as ratios to PEFT's LoRA.

    python benchmarks/speed.py

In one run, interleaved: a round trains every method for some steps on the same batches and predicts
with it, then comes the next round. A ratio is the median over rounds and steps of a step's time
over that of LoRA on the same batch in the same round. Each method's peak memory is measured in a
process of its own. Writes benchmarks/results/speed.json and docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from bara.bench.models import MODELS, Fitted, fit
from bara.bench.spec import Benchmark
from bara.bench.tasks import Splits, load_task
from bara.cli.terminal import quieten_libraries
from bara.errors import BaraError
from bara.files import atomic_write_text
from bara.methods import METHODS
from bara.quickstart import versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/speed.json"
PAGE = ROOT / "docs/speed.md"
TASK = "tweet-sentiment"
LANGUAGE_MODELS = ("smollm2",)
BASELINE = "lora"
NUM_DRAWS = 10
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


@dataclass
class Times:
    """One method's seconds, a list for each round."""

    steps: list[list[float]] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)


def train(
    model: str, method: str, splits: Splits, steps: int, callback: TrainerCallback, folder: str
) -> Fitted:
    """Trains with the quickstart's settings, for some steps."""
    training = {"max_steps": steps + WARM_UP, "logging_strategy": "no"}
    benchmark = Benchmark("speed", model, [TASK], [method], training=training)
    return fit(next(benchmark.cells()), splits, Path(folder), [callback])


def run_round(model: str, method: str, splits: Splits, steps: int, times: Times) -> None:
    """Trains and predicts once."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        fitted = train(model, method, splits, steps, timer, folder)
        times.steps.append(timer.seconds[WARM_UP : WARM_UP + steps])

        def means() -> None:
            for _ in range(NUM_DRAWS):
                fitted.predict(splits.test, deterministic=True)

        times.draws.append(timed(lambda: fitted.predict(splits.test, num_draws=NUM_DRAWS)))
        times.forwards.append(timed(means))


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
    """Tweets: 320 to train on, 64 held out and 64 to predict; for a language model as questions,
    with the sentiments as choices."""
    train, validation, test = load_task(TASK).sample(320, 64, 64, seed=0)
    assert validation is not None
    if model in LANGUAGE_MODELS:
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


def measure(model: str, methods: list[str], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Every method's row, by its name; a method that this model cannot have is left out."""
    splits = load_data(model)
    times = {method: Times() for method in methods}
    for number in range(rounds):
        for method in list(times):
            try:
                run_round(model, method, splits, steps, times[method])
                print(f"{model} round {number}: {method}", flush=True)
            except BaraError as error:
                del times[method]
                print(f"{model}: {method} is left out: {error}", flush=True)
    memory = {method: memory_in_child(model, method, steps) for method in times}
    plain = times[BASELINE]
    return {
        method: {
            "step_ms": 1e3 * median(s for steps_ in own.steps for s in steps_),
            "step_ratio": ratio(own.steps, plain.steps),
            "memory_mib": memory[method],
            "memory_ratio": memory[method] / memory[BASELINE],
            "draws_s": median(own.draws),
            "draws_ratio_lora_forwards": median(
                map(lambda ours, theirs: ours / theirs, own.draws, plain.forwards)
            ),
            "draws_ratio_own_forwards": median(
                map(lambda ours, theirs: ours / theirs, own.draws, own.forwards)
            ),
        }
        for method, own in times.items()
    }


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


def write_page(results: dict[str, Any]) -> None:
    """The tables of docs/speed.md."""
    lines = [
        "# Speed and memory",
        "",
        f"Made by `{results['command']}` from `benchmarks/results/speed.json`; do not edit.",
        "",
        f"Medians over {results['rounds']} rounds of {results['steps']} training steps (batches of "
        "32 tweets, r = 8), all methods interleaved, every step against LoRA's on the same batch "
        "of the same round. Memory is what training takes above the loaded model. Prediction is "
        f"{NUM_DRAWS} draws for 64 tweets, against {NUM_DRAWS} passes of LoRA and "
        f"against {NUM_DRAWS} passes of the method's own mean mode.",
        "",
        f"{results['versions']['machine']}, {results['versions']['precision']}, torch "
        f"{results['versions']['torch']}.",
    ]
    for model, rows in results["models"].items():
        lines += [
            "",
            f"## {model}",
            "",
            "| | step, ms | step / LoRA | memory, MiB | memory / LoRA | prediction, s | "
            "/ LoRA's passes | / own passes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {method} | {row['step_ms']:.0f} | {row['step_ratio']:.2f} | "
            f"{row['memory_mib']:.0f} | {row['memory_ratio']:.2f} | {row['draws_s']:.2f} | "
            f"{row['draws_ratio_lora_forwards']:.2f} | {row['draws_ratio_own_forwards']:.2f} |"
            for method, row in rows.items()
        ]
    atomic_write_text(PAGE, "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "METHOD"), help="for its own use")
    arguments = parser.parse_args()
    quieten_libraries()
    if arguments.memory:
        model, method = arguments.memory
        print(training_memory(model, method, load_data(model), arguments.steps))
        return
    methods = [BASELINE, *(m for m in arguments.methods if m != BASELINE)]
    results = {
        "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "versions": versions(),
        "models": {
            model: measure(model, methods, arguments.rounds, arguments.steps)
            for model in arguments.models
        },
    }
    atomic_write_text(arguments.output, json.dumps(results, indent=2) + "\n")
    if arguments.output == RESULTS:
        write_page(results)


if __name__ == "__main__":
    main()
