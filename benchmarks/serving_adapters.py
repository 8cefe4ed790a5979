"""Adapters for the benchmarks of `bara serve`: MiniLM on tweets, SmolLM2-135M-Instruct on texts.

Speed and equality do not depend on how good the answers are: MiniLM is trained for some steps, and
SmolLM2, whose B is random, so that its draws differ, for one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset

from bara.bench.models import MODELS
from bara.data.examples import load_sentiment
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.methods.recipe import TrainRecipe

STEPS = {"minilm": 40, "smollm2": 1}
TEXTS = {
    "prompt": ["The sky is", "A good cook", "In the morning", "The river"],
    "completion": [" blue.", " takes time.", " it rained.", " is long."],
}


def make(folder: Path, model: str, method: str) -> Path:
    """The folder of an adapter, made if it is not there."""
    if (folder / "adapter_config.json").is_file():
        return folder
    language = model == "smollm2"
    recipe = TrainRecipe(
        model=str(MODELS[model]()),
        output=str(folder),
        method=method,
        task="causal-lm" if language else None,
        method_options={"weight_noise": 1.0} if method == "bara" else {},
        training={
            "max_steps": STEPS[model],
            "save_strategy": "no",
            "logging_strategy": "no",
            "use_cpu": True,
        },
    )
    finetune(recipe, Dataset.from_dict(TEXTS) if language else load_sentiment(300, 1, 1).train)
    if language:
        adapter, _, _ = load_adapter(folder)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
        adapter.save_pretrained(folder)
    return folder
