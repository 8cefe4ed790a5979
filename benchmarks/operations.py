"""How many operations a training step takes per adapted layer, by method.

    python benchmarks/operations.py

Small operations, not arithmetic, are what a step of a Bayesian adapter costs on a GPU; their number
is the same on every machine. Counted are dispatched operations without views, forward and backward,
of one more block of a Llama (r = 16, seven targets, bfloat16 base under autocast), over its adapted
layers: so the block's own operations are part of every count, and the embedding and the loss are
not. On a GPU with Triton BaRA and BaLoRA have kernels, whose launches count as one operation each.
The table goes to docs/speed.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from bara.posteriors.kernels import on_device
from bara.posteriors.registry import FAMILIES

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/operations.json"
PAGE = ROOT / "docs/speed.md"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BEGIN, END = "<!-- operations -->", "<!-- /operations -->"
KERNELS = ", with kernels"
WITHOUT = ("lora", "mc-dropout", "scalabl", "rankwise", "sgp-lora", "blob", "balora", "bara")
METHODS = (*WITHOUT, f"balora{KERNELS}", f"bara{KERNELS}")


class Counter(TorchDispatchMode):
    """Counts what is dispatched inside, but for views and what only allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        view = getattr(func, "is_view", False) or func.namespace == "prim"
        if not view and "empty" not in str(func):
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def launches_counted(counter: Counter, with_kernels: bool) -> Iterator[None]:
    """Kernels as a GPU has them, a launch for an operation; what they compute is nothing here."""
    if not with_kernels:
        yield
        return
    from bara.posteriors.kernels import blocks

    def launch(*_: Any, **__: Any) -> None:
        counter.count += 1

    def checked(step: Any, name: str, *_: Any) -> Any:
        return import_module(f"bara.posteriors.kernels.{name}").kernel(step)

    with (
        patch.object(blocks, "launch", launch),
        patch.object(on_device, "DEVICES", ("cpu",)),
        patch.object(on_device, "checked", checked),
    ):
        yield


def step_operations(method: str, num_layers: int) -> int:
    """Operations of the second training step, when everything that happens once has happened."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).to(torch.bfloat16)
    options: dict[str, Any] = {"r": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if method == "lora":
        config = LoraConfig(**options)
    else:
        family = FAMILIES[method.removesuffix(KERNELS)]
        config = family.config(num_observations=50, warmup=0.0, **options)
    adapted = get_peft_model(model, config).train()
    ids = torch.arange(24).reshape(2, 12) + 1
    count = 0
    for _ in range(2):
        with Counter() as counter, launches_counted(counter, method.endswith(KERNELS)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
        count = counter.count
        adapted.zero_grad()
    return count


def per_layer(method: str) -> float:
    """Operations of an adapted layer, its share of the block included."""
    return (step_operations(method, 3) - step_operations(method, 2)) / len(TARGETS)


def section() -> str:
    """The part of docs/speed.md, from the committed counts; `benchmarks/speed.py` keeps it."""
    counts: dict[str, float] = json.loads(RESULTS.read_text("utf-8"))
    rows = [f"| {method} | {n:.1f} | {n - counts['lora']:+.1f} |" for method, n in counts.items()]
    lines = [
        "",
        BEGIN,
        "## Operations",
        "",
        "Dispatched operations without views of a training step, per adapted layer: forward and "
        "backward of one more block of a Llama (r = 16, seven targets, bfloat16 base under "
        "autocast) over its seven layers. `python benchmarks/operations.py` counts them; a GPU "
        "waits for each, and the number is the same on every machine. With kernels (Triton, on a "
        "GPU) a launch counts as one.",
        "",
        "| method | operations a layer | beside LoRA |",
        "|---|---|---|",
        *rows,
        "",
        END,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    counts = {method: round(per_layer(method), 1) for method in METHODS}
    RESULTS.write_text(json.dumps(counts, indent=2) + "\n", "utf-8")
    text = re.sub(rf"\n{BEGIN}.*?{END}\n", "", PAGE.read_text("utf-8"), flags=re.DOTALL)
    PAGE.write_text(text + section(), "utf-8")
    print(section())


if __name__ == "__main__":
    main()
