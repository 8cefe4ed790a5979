"""Training steps with and without torch.compile, on a CPU or a GPU, as ratios to PEFT's LoRA.

    python benchmarks/compiled_speed.py            # on the GPU where there is one
    python benchmarks/compiled_speed.py --device cpu --models minilm

All adapters of a model are trained side by side in one process and take turns, one step each: eager
ones, on a GPU also without kernels of ours (`pytorch`), some whose blocks are compiled, one graph
for all, and some that are compiled as a whole. All are in bfloat16 autocast. The models have random
weights, which are nothing to their speed, in the sizes of real ones. Every model's row is written
to benchmarks/results/compiled_speed.jsonl when it is finished; the tables go to
docs/compiled-speed.md.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import bara
from bara.bench.results import append_row, read_lines
from bara.files import atomic_write_text
from bara.machine import quieten_libraries, versions
from bara.methods.table import METHODS
from bara.posteriors.kernels.on_device import VARIABLE

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/compiled_speed.jsonl"
PAGE = ROOT / "docs/compiled-speed.md"
COMPARED = ("lora", "bara", "balora", "blob", "scalabl", "rankwise", "mc-dropout")
MODES = ("eager", "pytorch", "blocks", "compiled")
CLASSES = 3
NUM_DRAWS = 10
NUM_PREDICTIONS = 3
"""How often each prediction is timed, after a first time that is not counted."""
WARM_UP = 4
"""Steps that are not counted; the first ones compile."""


@dataclass(frozen=True)
class Size:
    """A model's size and its batches.

    Attributes:
        make: makes the model, with random weights.
        blocks: the model's blocks.
        targets: the layers that are adapted.
        vocabulary: number of tokens.
        batch: texts in a batch.
        length: tokens in the longest text; the shortest has half as many.
        rank: r.
    """

    make: Callable[[], nn.Module]
    blocks: Callable[[Any], Any]
    targets: list[str]
    vocabulary: int
    batch: int
    length: int
    rank: int


def bert(hidden: int, layers: int) -> nn.Module:
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * hidden,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config)


def llama(hidden: int, layers: int, heads: int, intermediate: int, vocabulary: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        pad_token_id=0,
        num_labels=CLASSES,
    )
    return LlamaForSequenceClassification(config).bfloat16()


SIZES = {
    "minilm": Size(
        partial(bert, 384, 6),
        lambda model: model.bert.encoder.layer,
        ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
        30522,
        batch=32,
        length=64,
        rank=8,
    ),
    "llama-1b": Size(
        partial(llama, 2048, 16, 32, 8192, 128256),
        lambda model: model.model.layers,
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        128256,
        batch=8,
        length=512,
        rank=16,
    ),
}
"""MiniLM-L6 in float32, and Llama-3.2-1B in bfloat16."""


class Adapted:
    """One method's adapter on a model of its own, and how a step of it is trained."""

    def __init__(self, method: str, size: Size, device: str, mode: str, steps: int) -> None:
        torch.manual_seed(0)
        options: dict[str, Any] = {"r": size.rank, "lora_alpha": 2 * size.rank}
        if method == "bara":
            options["weight_noise"] = 1.0  # so few steps would have none; its size is no matter
        config = METHODS[method].config
        assert config is not None
        self.bayesian = config is not LoraConfig
        if self.bayesian:
            options["num_observations"] = 1000
        with torch.device(device):
            model = size.make()
        config = config(target_modules=size.targets, task_type="SEQ_CLS", **options)
        self.model = get_peft_model(model, config).train()
        self.device = device
        self.steps = steps
        self.variables = {VARIABLE: "0"} if mode == "pytorch" else {}
        self.call: Any = self.model
        if mode == "blocks":
            for block in size.blocks(self.model.get_base_model()):
                block.compile()
        elif mode == "compiled":
            self.call = torch.compile(self.model)
        trained = (p for p in self.model.parameters() if p.requires_grad)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step(self, number: int, batch: dict[str, Tensor]) -> None:
        """One training step."""
        if self.bayesian:
            bara.set_progress(self.model, number / self.steps, self.steps)
        with patch.dict(os.environ, self.variables), torch.autocast(self.device, torch.bfloat16):
            loss = self.call(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def text_batch(size: Size, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Random texts of random lengths, padded on the right to the model's longest."""
    shape = (size.batch, size.length)
    lengths = torch.randint(size.length // 2, size.length + 1, (size.batch, 1), generator=generator)
    mask = (torch.arange(size.length) < lengths).long()
    ids = torch.randint(1, size.vocabulary, shape, generator=generator) * mask
    labels = torch.randint(CLASSES, (size.batch,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def draws(model: nn.Module, batch: dict[str, Tensor], device: str) -> None:
    """A prediction with all draws."""
    with torch.autocast(device, torch.bfloat16):
        bara.predict(model, batch, num_draws=NUM_DRAWS, progress=False)


def passes(model: nn.Module, batch: dict[str, Tensor], device: str) -> None:
    """As many predictions with the mean."""
    with torch.autocast(device, torch.bfloat16):
        for _ in range(NUM_DRAWS):
            bara.predict(model, batch, deterministic=True, progress=False)


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of a call, of what it leaves to a GPU too."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    name: str, device: str, methods: list[str], modes: list[str], steps: int
) -> dict[str, Any]:
    """Seconds of the steps of every method, eager and compiled, and of predictions; on a GPU what a
    step takes of its memory, MiB."""
    size = SIZES[name]
    total = WARM_UP + steps
    adapted = {
        (method, mode): Adapted(method, size, device, mode, total)
        for method in methods
        for mode in modes
    }
    keys = [f"{method} {mode}" for method, mode in adapted]
    seconds: dict[str, list[float]] = {key: [] for key in keys}
    memory: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    order = list(zip(keys, adapted.values(), strict=True))
    for number in range(total):
        batch = text_batch(size, device, generator)
        for key, one in order:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            seconds[key].append(timed(partial(one.step, number, batch), device))
            if device == "cuda":
                memory[key] = (torch.cuda.max_memory_allocated() - before) / 2**20
        order.reverse()  # whoever was last is first next time
        if number + 1 == WARM_UP:
            first = {key: sum(values) for key, values in seconds.items()}
    batch.pop("labels")
    predictions: dict[str, list[float]] = {}
    for _ in range(NUM_PREDICTIONS + 1 if "eager" in modes else 0):
        for method in methods:
            model = adapted[method, "eager"].model
            for kind, call in (("draws", draws), ("passes", passes)):
                times = predictions.setdefault(f"{method} {kind}", [])
                times.append(timed(partial(call, model, batch, device), device))
    return {
        "model": name,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "steps": {key: values[WARM_UP:] for key, values in seconds.items()},
        "first_steps": first,
        "memory_mib": memory,
        "predictions": {key: values[1:] for key, values in predictions.items()},
        "versions": versions(),
    }


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Median over the turns."""
    return median(a / b for a, b in zip(times[ours], times[theirs], strict=True))


def write_page(records: list[dict[str, Any]], page: Path) -> None:
    """The tables of docs/compiled-speed.md."""
    lines = [
        "# Training steps with torch.compile",
        "",
        "Made by `python benchmarks/compiled_speed.py` from "
        "`benchmarks/results/compiled_speed.jsonl`; do not edit.",
        "",
        "Adapters of one model in one process take turns, one step each, in bfloat16 autocast: "
        "eager, on a GPU also with PyTorch's operations in place of our kernels (`pytorch`), "
        "with compiled blocks (`block.compile()` for every block of the model), or compiled "
        "as a whole (`torch.compile(model)`). A ratio is the median over the turns. The models "
        "have the sizes of real ones and random weights; texts have one half to all of the "
        f"longest's length. The first {WARM_UP} steps, "
        "which compile, are not in the medians. / LoRA is against LoRA in the same mode. Memory is "
        "what a step takes above the models at its peak (GPU only). Predictions are eager: "
        f"`bara.predict` with {NUM_DRAWS} draws against {NUM_DRAWS} passes of LoRA.",
        "",
        "The rows of the H100 are of an older torch than we ask for, and from before BaRA "
        "and BaLoRA came to do with fewer operations ([limits](limits.md#training)).",
    ]
    for record in records:
        size, about = SIZES[record["model"]], record["versions"]
        steps, memory, first = (record[n] for n in ("steps", "memory_mib", "first_steps"))
        lines += [
            "",
            f"## {record['model']}, {record['device']}",
            "",
            f"r = {size.rank}, {size.batch} texts of at most {size.length} tokens, "
            f"{len(next(iter(steps.values())))} steps; torch {about['torch']}, transformers "
            f"{about['transformers']}, peft {about['peft']}; {about['machine']}.",
            "",
            "| | step, ms | / LoRA | / eager LoRA | first steps, s | memory / LoRA | "
            "draws / LoRA's passes |",
            "|---|---|---|---|---|---|---|",
        ]
        for key, values in steps.items():
            method, mode = key.split()
            lora = f"lora {mode}"
            columns = [
                key,
                f"{1e3 * median(values):.1f}",
                f"{ratio(steps, key, lora):.2f}",
                f"{ratio(steps, key, 'lora eager'):.2f}" if "lora eager" in steps else "",
                f"{first[key]:.0f}",
                f"{memory[key] / memory[lora]:.2f}" if memory else "",
                f"{ratio(record['predictions'], f'{method} draws', 'lora passes'):.2f}"
                if method != "lora" and mode == "eager"
                else "",
            ]
            lines.append(f"| {' | '.join(columns)} |")
    atomic_write_text(page, "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=list(COMPARED), choices=list(COMPARED))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    quieten_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if arguments.device == "cpu":  # which has no kernels
        arguments.modes = [mode for mode in arguments.modes if mode != "pytorch"]
    methods = list(dict.fromkeys(["lora", *arguments.methods]))  # all ratios are to it
    for name in arguments.models:
        torch.compiler.reset()
        record = measure(name, arguments.device, methods, arguments.modes, arguments.steps)
        append_row(arguments.output, record)
        write_page(read_lines(arguments.output), arguments.page)
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
