"""Training step, memory and prediction of every method, as ratios to PEFT's LoRA.

    python benchmarks/speed.py

Every method is paired with LoRA: two processes train on the same batches and take turns, one step
each, so that whatever slows the machine down slows both. A ratio is the median over the pairs of
steps; predictions take turns in the same way. Every finished pair is written to
benchmarks/results/speed.jsonl at once; a second run goes on where the first stopped. The tables go
to docs/speed.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from bara.bench.models import MODELS, fit
from bara.bench.results import append_row, read_lines
from bara.bench.spec import Benchmark
from bara.bench.tasks import Splits, load_task
from bara.errors import BaraError
from bara.files import atomic_write_text
from bara.machine import quieten_libraries, versions
from bara.methods.table import METHODS
from operations import section as operations_section

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/speed.jsonl"
PAGE = ROOT / "docs/speed.md"
TASK = "tweet-sentiment"
NUM_PREDICT = {"minilm": 64, "smollm2": 8}
"""Texts to predict; a language model reads each as a question with three choices."""
BATCH = {"minilm": 32, "smollm2": 8}
"""Texts in a batch of training: the defaults."""
MAX_LENGTH = {"minilm": 64, "smollm2": 128}
STEPS = {"minilm": 61, "smollm2": 25}
"""Pairs of steps of a run."""
BASELINE = "lora"
REFERENCES = Path("/proc/self/clear_refs")
NUM_DRAWS = 10
OPTIONS: dict[str, dict[str, Any]] = {"bara": {"weight_noise": 1.0}}
"""By default so few steps would have no noise on A; its size is nothing to its time."""
WARM_UP = 3
"""Steps at the start of a training run that are not counted."""
NUM_PREDICTIONS = 3
"""How often each prediction is timed."""


class Turns(TrainerCallback):
    """Waits before each optimiser step until it is told to go on, and tells the step's seconds.

    Attributes:
        memory_mib: what training takes above what the process held before, at its peak; NaN where
            the system does not tell (it does on Linux).
    """

    def __init__(self, other: Connection) -> None:
        self.other = other
        self.memory_mib = float("nan")

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if REFERENCES.exists():
            REFERENCES.write_text("5")  # the peak starts anew from here
            self.before = status("VmRSS")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if REFERENCES.exists():
            self.memory_mib = (status("VmHWM") - self.before) / 2**10

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.other.recv() is None:
            raise SystemExit  # LoRA's partner cannot be had
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.other.send(time.perf_counter() - self.start)


class Runner:
    """A method that is trained and predicts in a process of its own, a step at a time."""

    def __init__(self, model: str, method: str) -> None:
        self.connection, other = multiprocessing.Pipe()
        arguments = (other, model, method)
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
        self.process.start()
        other.close()

    def ask(self, request: str) -> Any:
        """Seconds of the step or the prediction asked for; what is not a number, once trained.

        Raises:
            BaraError: the model cannot have this method.
        """
        self.connection.send(request)
        answer = self.connection.recv()
        if isinstance(answer, str):
            raise BaraError(answer)
        return answer

    def close(self) -> None:
        if self.process.is_alive():
            self.connection.send(None)
        self.process.join()


def serve(other: Connection, model: str, method: str) -> None:
    """What a runner's process does."""
    quieten_libraries()
    splits, turns = load_data(model), Turns(other)
    benchmark = Benchmark(
        "speed",
        model,
        [TASK],
        [method],
        training={"max_steps": STEPS[model] + WARM_UP, "logging_strategy": "no"},
        method_options=OPTIONS.get(method, {}),
        max_length=MAX_LENGTH[model],
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            fitted = fit(next(benchmark.cells()), splits, Path(folder), [turns])
        except BaraError as error:
            other.recv()
            other.send(str(error))
            return

        def forwards() -> None:
            for _ in range(NUM_DRAWS):
                fitted.predict(splits.test, deterministic=True)

        def draws() -> None:
            fitted.predict(splits.test, num_draws=NUM_DRAWS)

        other.recv()
        other.send({"memory_mib": turns.memory_mib})
        while (request := other.recv()) is not None:
            other.send(timed(draws if request == "draws" else forwards))


def run_pair(model: str, method: str) -> dict[str, Any]:
    """A method and LoRA in turns: seconds of every step, draw and plain pass, and MiB.

    Raises:
        BaraError: the model cannot have this method.
    """
    runners = {"own": Runner(model, method), "lora": Runner(model, BASELINE)}
    predictions = [("own", "draws"), ("own", "forwards"), ("lora", "forwards")]
    record: dict[str, Any] = {f"{name}_steps": [] for name in runners}
    record |= {f"{name}_{request}": [] for name, request in predictions}
    try:
        waiting, pair = dict(runners), 0
        while waiting:
            turns = list(waiting.items())
            if pair % 2:  # long and short batches alternate; each has either one first in turn
                waiting = dict(reversed(turns))
            pair += 1
            for name, runner in turns:
                answer = runner.ask("step")
                if isinstance(answer, dict):
                    record[f"{name}_memory_mib"] = answer["memory_mib"]
                    del waiting[name]
                else:  # an ensemble takes as many steps again for each of its members
                    record[f"{name}_steps"].append(answer)
        for _ in range(NUM_PREDICTIONS):
            for name, request in predictions:
                record[f"{name}_{request}"].append(runners[name].ask(request))
    finally:
        for runner in runners.values():
            runner.close()
    for name in runners:
        record[f"{name}_steps"] = record[f"{name}_steps"][WARM_UP : WARM_UP + STEPS[model]]
    return record


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


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


def summary(records: list[dict[str, Any]]) -> dict[str, float]:
    """A method's row, from all its pairs."""

    def values(name: str) -> list[float]:
        return [v for record in records for v in record[name]]

    def ratio(ours: str, theirs: str) -> float:
        return median(a / b for a, b in zip(values(ours), values(theirs), strict=True))

    def memory(name: str) -> list[float]:  # the file has null for what is not known
        return [r[f"{name}_memory_mib"] or float("nan") for r in records]

    own, lora = memory("own"), memory("lora")
    return {
        "step_ms": 1e3 * median(values("own_steps")),
        "step_ratio": ratio("own_steps", "lora_steps"),
        "memory_mib": median(own),
        "memory_ratio": median(a / b for a, b in zip(own, lora, strict=True)),
        "draws_s": median(values("own_draws")),
        "draws_ratio_lora_forwards": ratio("own_draws", "lora_forwards"),
        "draws_ratio_own_forwards": ratio("own_draws", "own_forwards"),
    }


def write_page(records: list[dict[str, Any]], page: Path) -> None:
    """The tables of docs/speed.md."""
    first = records[0]["versions"]
    lines = [
        "# Speed and memory",
        "",
        "Made by `python benchmarks/speed.py` from `benchmarks/results/speed.jsonl`; do not edit.",
        "",
        "r = 8. Every method is paired with LoRA: two processes train on the same batches and take "
        "turns, one step each, and a ratio is the median over the pairs of steps; LoRA's own row "
        "is LoRA against itself, and says how far a ratio can be trusted. Memory is what training "
        "takes above the loaded model at its peak: what loading has left with the allocator counts "
        f"for nothing, so that a number can be too low. Prediction is {NUM_DRAWS} draws, against "
        f"{NUM_DRAWS} passes of LoRA and against {NUM_DRAWS} passes of the method's own mean mode.",
        "",
        f"{first['machine']}, {first['precision']}. A row says with which bara and torch it was "
        "measured: those of 0.1 are of before the [fused step](training.md#what-a-step-costs).",
    ]
    for model in MODELS:
        pairs = {
            method: [r for r in records if (r["model"], r["method"]) == (model, method)]
            for method in METHODS
        }
        pairs = {method: mine for method, mine in pairs.items() if mine}
        if not pairs:
            continue
        runs = min(len(mine) for mine in pairs.values())
        steps = sorted({len(r["own_steps"]) for mine in pairs.values() for r in mine})
        lines += [
            "",
            f"## {model}",
            "",
            f"{' or '.join(map(str, steps))} pairs of steps a run, {BATCH[model]} tweets a step; "
            f"at least {runs} run of every method; {NUM_PREDICT[model]} tweets are predicted.",
            "",
            "| | step, ms | step / LoRA | memory, MiB | memory / LoRA | prediction, s | "
            "/ LoRA's passes | / own passes | bara, torch |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {method} | {row['step_ms']:.0f} | {row['step_ratio']:.2f} | "
            f"{row['memory_mib']:.0f} | {row['memory_ratio']:.2f} | {row['draws_s']:.2f} | "
            f"{row['draws_ratio_lora_forwards']:.2f} | {row['draws_ratio_own_forwards']:.2f} | "
            f"{pairs[method][-1]['versions']['bara-peft']}, "
            f"{pairs[method][-1]['versions']['torch']} |"
            for method, row in ((method, summary(mine)) for method, mine in pairs.items())
        ]
    atomic_write_text(page, "\n".join(lines) + "\n" + operations_section())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    refused: set[tuple[str, str]] = set()
    for finished in range(arguments.rounds):
        for model in arguments.models:
            for method in arguments.methods:
                known = read_lines(arguments.output)
                mine = [r for r in known if (r["model"], r["method"]) == (model, method)]
                if len(mine) > finished or (model, method) in refused:
                    continue
                try:
                    pair = run_pair(model, method)
                except BaraError as error:
                    refused.add((model, method))
                    print(f"{model}: {method} is left out: {error}", flush=True)
                    continue
                record = {"model": model, "method": method} | pair | {"versions": versions()}
                append_row(arguments.output, record)
                write_page([*known, record], arguments.page)
                print(f"{model}: {method} {summary([record])['step_ratio']:.2f}", flush=True)


if __name__ == "__main__":
    main()
