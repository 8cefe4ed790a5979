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

import torch
from datasets import Dataset
from transformers import TrainerCallback

from bara.bench.models import MODELS
from bara.bench.tasks import first, load_task
from bara.cli.terminal import quieten_libraries
from bara.data import tokenise
from bara.files import atomic_write_text
from bara.finetune import finetune
from bara.loading import load_adapter
from bara.methods import METHODS
from bara.prediction import predict
from bara.quickstart import fast_bfloat16, versions
from bara.recipe import TrainRecipe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/speed.json"
PAGE = ROOT / "docs/speed.md"
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


def recipe_of(model: str, method: str, folder: Path, steps: int) -> TrainRecipe:
    """The quickstart's settings, for some steps."""
    return TrainRecipe(
        model=str(MODELS[model]()),
        output=str(folder),
        method=method,
        max_length=64,
        training={
            "max_steps": steps + WARM_UP,
            "save_strategy": "no",
            "eval_strategy": "no",
            "logging_strategy": "no",
            "bf16": fast_bfloat16(),
            "use_cpu": not torch.cuda.is_available(),
        },
    )


def run_round(model: str, method: str, data: dict[str, Dataset], steps: int, times: Times) -> None:
    """Trains and predicts once."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(model, method, Path(folder), steps)
        finetune(recipe, data["train"], data["validation"], callbacks=[timer])
        trained, tokenizer, task = load_adapter(folder)
        times.steps.append(timer.seconds[WARM_UP : WARM_UP + steps])
        inputs = tokenise(data["test"], tokenizer, task)
        times.draws.append(timed(lambda: predicted(trained, inputs, NUM_DRAWS)))
        times.forwards.append(
            timed(lambda: [predicted(trained, inputs, None) for _ in range(NUM_DRAWS)])
        )


def predicted(model: Any, inputs: Dataset, num_draws: int | None) -> None:
    """Predicts with draws, or once with the mean."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bfloat16()):
        predict(
            model,
            inputs,
            num_draws=num_draws or 1,
            deterministic=num_draws is None,
            progress=False,
        )


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def training_memory(model: str, method: str, data: dict[str, Dataset], steps: int) -> float:
    """MiB that training takes above what the process held before, at its peak (Linux only)."""

    class Reset(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
            self.before = status("VmRSS")

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.peak = status("VmHWM")

    reset = Reset()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(model, method, Path(folder), steps)
        finetune(recipe, data["train"], data["validation"], callbacks=[reset])
    return (reset.peak - reset.before) / 2**10


def status(name: str) -> int:
    """A number of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def load_data() -> dict[str, Dataset]:
    """Tweets: 320 to train on, 64 held out and 64 to predict."""
    train, validation, test = load_task("tweet-sentiment").sample(320, 64, 64, seed=0)
    assert validation is not None
    return {"train": train, "validation": validation, "test": first(test, 64)}


def measure(model: str, methods: list[str], rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Every method's row, by its name."""
    data = load_data()
    times = {method: Times() for method in methods}
    for number in range(rounds):
        for method in methods:
            run_round(model, method, data, steps, times[method])
            print(f"{model} round {number}: {method}", flush=True)
    memory = {method: memory_in_child(model, method, steps) for method in methods}
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
        print(training_memory(*arguments.memory, load_data(), arguments.steps))
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
