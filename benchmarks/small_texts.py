"""An adapter for MiniLM-L6 on a small table of texts, as several benchmarks train it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from bara.data.examples import minilm_path
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.machine import fast_bfloat16
from bara.methods.recipe import TrainRecipe

MAX_LENGTH = 40


def trained(
    table: Dataset, seed: int, method: str, options: dict[str, Any], **training: Any
) -> tuple[Any, Any, Any, float]:
    """Trains with the library's default recipe, but for what is given.

    Args:
        table: texts and labels.
        seed: of the training.
        method, options: its name and its options, over the defaults.
        training: arguments of training, over the defaults.

    Returns:
        The model, its tokeniser, its task, and the seconds that all of it took.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        recipe = TrainRecipe(
            model=str(minilm_path()),
            output=str(Path(folder) / "adapter"),
            method=method,
            method_options=options,
            training={
                "save_strategy": "no",
                "bf16": fast_bfloat16(),
                "use_cpu": not torch.cuda.is_available(),
                **training,
            },
            max_length=MAX_LENGTH,
            seed=seed,
        )
        model, tokenizer, task = load_adapter(finetune(recipe, table))
    return model, tokenizer, task, time.perf_counter() - start
