"""What predictions and training cost as draws, layers, rank, tokens and adapters grow.

    python benchmarks/scaling.py            # measures, a minute
    python benchmarks/scaling.py --page     # only writes the page, from the committed results

Formulae of the arithmetic are held against what torch counts on small models, for which times are
measured too; the same formulae then work out large models. The tables go to docs/scaling.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForSequenceClassification

import bara
from bara.machine import versions
from pages import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/scaling.json"
PAGE = ROOT / "docs/scaling.md"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS, REPEATS = 4, 3
GPU_FLOPS, UTILISATION, GPU_BYTES = 989e12, 0.4, 80e9
"""An H100's dense bfloat16 arithmetic, the part of it that is reached, and its memory: assumed."""
A_DAY = 1e9
TOKENS, DRAWS, RANK, MEMBERS = 128, 10, 16, 5


@dataclass(frozen=True)
class Shape:
    """A decoder with an adapter on all linear layers of its blocks.

    Attributes:
        hidden, inner: widths. kv: width of keys and values.
        layers: blocks. vocabulary: rows of the embedding.
        rank: r. tokens: T of an input. draws: S. adapters: loaded on the model, one active.
    """

    hidden: int = 128
    inner: int = 256
    kv: int = 64
    layers: int = 4
    vocabulary: int = 64
    rank: int = 8
    tokens: int = 32
    draws: int = 4
    adapters: int = 1

    def matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of a block."""
        h, m, kv = self.hidden, self.inner, self.kv
        return [(h, h), (h, kv), (h, kv), (h, h), (h, m), (h, m), (m, h)]

    def base_parameters(self) -> int:
        """Of the blocks and the embedding; norms count for nothing here."""
        return self.layers * sum(i * o for i, o in self.matrices()) + self.vocabulary * self.hidden

    def adapter_parameters(self, method: str = "bara") -> int:
        """A and B; of BaRA also r gates, r noises and the r x r map of the inputs' gates."""
        r = self.rank
        own = r * r + 3 * r if method == "bara" else 0
        return self.layers * sum(r * (i + o) + own for i, o in self.matrices())

    def pass_flops(self, method: str = "base") -> float:
        """Of one input, one draw, forward: two a multiplication, attention without its mask."""
        r, t = self.rank, self.tokens
        per_token = 0
        for i, o in self.matrices():
            per_token += 2 * i * o
            if method != "base":
                per_token += 2 * r * (i + o)
            if method == "bara":  # the second projection is the variance of the noise on A
                per_token += 2 * r * i + 2 * r * r
        return self.layers * t * (per_token + 4 * t * self.hidden)


def model_of(shape: Shape, method: str) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=4,
            num_key_value_heads=4 * shape.kv // shape.hidden,
            attn_implementation="eager",
            pad_token_id=0,
            num_labels=2,
        )
    )
    if method == "base":
        return model.eval()
    options: dict[str, Any] = {"r": shape.rank, "target_modules": TARGETS, "task_type": "SEQ_CLS"}
    config = LoraConfig if method == "lora" else bara.BaraConfig
    model = get_peft_model(model, config(**options))
    for number in range(1, shape.adapters):
        model.add_adapter(f"adapter-{number}", config(**options))
    return model.eval()


def inputs(shape: Shape, rows: int = ROWS) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, shape.vocabulary, (rows, shape.tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def predicting(shape: Shape, method: str) -> Callable[[], Any]:
    model, batch = model_of(shape, method), inputs(shape)
    draws = shape.draws if method == "bara" else 1
    return lambda: bara.predict(model, batch, num_draws=draws, batch_size=ROWS * draws)


def counted(shape: Shape, method: str) -> float:
    """Arithmetic of one input, by torch's count, without the head's."""
    predict = predicting(shape, method)
    with FlopCounterMode(display=False) as counter:
        predict()
    draws = shape.draws if method == "bara" else 1
    head = draws * shape.tokens * 2 * shape.hidden * 2
    return counter.get_total_flops() / ROWS - head


def milliseconds(shape: Shape, method: str) -> float:
    """Processor time of the quickest of several, per input."""
    predict = predicting(shape, method)
    predict()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        predict()
        times.append(time.process_time() - start)
    return 1000 * min(times) / ROWS


GROWING: dict[str, list[int]] = {
    "draws": [1, 4, 16],
    "layers": [2, 4, 8],
    "rank": [4, 16, 64],
    "tokens": [16, 32, 64],
    "adapters": [1, 2, 4],
}


def measure() -> None:
    torch.set_num_threads(1)
    cells = []
    for name, values in GROWING.items():
        for value in values:
            shape = replace(Shape(), **{name: value})
            for method in ("base", "lora", "bara"):
                draws = shape.draws if method == "bara" else 1
                cells.append(
                    {
                        "grows": name,
                        "value": value,
                        "method": method,
                        "formula": draws * shape.pass_flops(method),
                        "counted": counted(shape, method),
                        "ms": milliseconds(shape, method),
                        "adapter_parameters": parameters_of(shape, method),
                    }
                )
    text = json.dumps({"versions": versions(), "shape": asdict(Shape()), "cells": cells}, indent=1)
    RESULTS.write_text(text + "\n", "utf-8")


def parameters_of(shape: Shape, method: str) -> list[int]:
    """By the formula, and of the model: numbers of all its adapters, without their heads."""
    if method == "base":
        return [0, 0]
    named = model_of(shape, method).named_parameters()
    found = sum(p.numel() for name, p in named if "lora_" in name and "modules_to_save" not in name)
    return [shape.adapters * shape.adapter_parameters(method), found]


LARGE = {
    "22M (MiniLM-L6's widths)": Shape(384, 1536, 384, 6, 30522, RANK, TOKENS, DRAWS),
    "1B (Llama 3.2)": Shape(2048, 8192, 512, 16, 128256, RANK, TOKENS, DRAWS),
    "8B (Llama 3.1)": Shape(4096, 14336, 1024, 32, 128256, RANK, TOKENS, DRAWS),
    "70B (Llama 3.1)": Shape(8192, 28672, 1024, 80, 128256, RANK, TOKENS, DRAWS),
}
"""Widths of well-known models; all have three matrices in the feed-forward part here."""


def gpus(flops: float) -> float:
    """How many are busy with a day's predictions."""
    return flops * A_DAY / (86400 * GPU_FLOPS * UTILISATION)


def growth_table(cells: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| what grows | from, to | arithmetic | time, BaRA | time, LoRA | adapter's numbers |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in GROWING.items():
        found = {
            (c["method"], c["value"]): c
            for c in cells
            if c["grows"] == name and c["method"] != "base"
        }
        first, last = values[0], values[-1]

        def times(method: str, key: str, found: Any = found, ends: Any = (first, last)) -> str:
            return f"× {found[method, ends[1]][key] / found[method, ends[0]][key]:.2f}"

        lora = "has none" if name == "draws" else times("lora", "ms")
        numbers = [found["bara", value]["adapter_parameters"][1] for value in (first, last)]
        lines.append(
            f"| {name} | {first}, {last} | {times('bara', 'counted')} | {times('bara', 'ms')} | "
            f"{lora} | × {numbers[1] / numbers[0]:.2f} |"
        )
    return lines


def paper_table() -> list[str]:
    lines = [
        "| model | adapter, MB | ensemble of "
        f"{MEMBERS} models, GB | base, GB | GFLOP a pass | BaRA's pass over LoRA's |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape in LARGE.items():
        base, lora, own = (shape.pass_flops(method) for method in ("base", "lora", "bara"))
        weights = 2 * shape.base_parameters() / 1e9
        lines.append(
            f"| {name} | {4 * shape.adapter_parameters() / 1e6:,.1f} | {MEMBERS * weights:,.2f} | "
            f"{weights:,.2f} | {base / 1e9:,.1f} | {100 * (own / lora - 1):+.2f}% |"
        )
    return lines


def day_table() -> list[str]:
    lines = [
        f"| model | LoRA, or BaRA's mean | BaRA, {DRAWS} draws | ensemble of {MEMBERS} models or "
        f"LoRAs | GPUs for one copy of the base | for {MEMBERS} |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape in LARGE.items():
        lora, own = shape.pass_flops("lora"), shape.pass_flops("bara")
        weights = 2 * shape.base_parameters() / GPU_BYTES
        lines.append(
            f"| {name} | {gpus(lora):,.1f} | {gpus(DRAWS * own):,.1f} | "
            f"{gpus(MEMBERS * lora):,.1f} | {weights:,.3f} | {MEMBERS * weights:,.3f} |"
        )
    return lines


def page() -> None:
    """Puts the tables into the page."""
    results = json.loads(RESULTS.read_text("utf-8"))
    cells = results["cells"]
    wrong = max(abs(c["formula"] / c["counted"] - 1) for c in cells)
    numbers = all(a == b for a, b in (c["adapter_parameters"] for c in cells))
    start = {c["method"]: c for c in cells if c["grows"] == "draws" and c["value"] == 1}
    check = [
        f"The formulae of the arithmetic differ from torch's count by {100 * wrong:.2f}% at most "
        f"over {len(cells)} models; those of the adapter's numbers "
        f"{'agree with every model' if numbers else 'do NOT agree'}. One draw took "
        f"{start['bara']['ms'] / start['lora']['ms']:.2f} times as long as LoRA's pass, and that "
        f"{start['lora']['ms'] / start['base']['ms']:.2f} times as long as the base model's: at "
        "this size small operations cost more than arithmetic.",
    ]
    sections = {
        "check": check,
        "growth": growth_table(cells),
        "paper": paper_table(),
        "day": day_table(),
    }
    for name, lines in sections.items():
        write_between(PAGE, name, "\n".join(["", *lines, ""]))


if __name__ == "__main__":
    if "--page" not in sys.argv:
        measure()
    page()
