"""What DeepSpeed trains, or nobody beside torch: run by tests/test_deepspeed.py in a process of its
own, since DeepSpeed keeps its process group.

python tests/deepspeed_run.py FOLDER CONFIG [--resume] [--language]
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import bara
from conftest import VOCABULARY, tiny_bert_config
from helpers import tiny_llama

STEPS = 6


def examples() -> Dataset:
    """Rows of two classes whose first token tells them apart."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(VOCABULARY), (32, 8), generator=generator)
    labels = (ids[:, 1] >= len(VOCABULARY) // 2).long()
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def prompts() -> Dataset:
    """Texts with as many labels as their row's number says."""
    ids = torch.randint(1, 64, (32, 8), generator=torch.Generator().manual_seed(0))
    labels = [ids[i].where(torch.arange(8) > i % 5, -100).tolist() for i in range(len(ids))]
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels})


def main(folder: Path, config: dict[str, Any], resume: bool, language: bool) -> None:
    """Trains, and writes what was trained, the loss, and what was warned of."""
    torch.manual_seed(0)
    accumulated: dict[str, Any] = {}
    if language:
        base: Any = tiny_llama()
        adapter = bara.BaraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        accumulated = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
        accumulated["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    else:
        base = BertForSequenceClassification(tiny_bert_config())
        adapter = bara.BaraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "bf16": "bf16" in config,
        "disable_tqdm": True,
        "deepspeed": config or None,
        **accumulated,
    }
    trainer = Trainer(
        get_peft_model(base, adapter),
        TrainingArguments(**options),
        train_dataset=prompts() if language else examples(),
        callbacks=[bara.BayesianCallback()],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = str(folder / f"checkpoint-{STEPS // 2}") if resume else None
        trainer.train(resume_from_checkpoint=checkpoint)
    said = [str(w.message) for w in caught if "The head learns" in str(w.message)]
    model: Any = trainer.model
    trained = {
        n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad
    }
    name = "resumed" if resume else "trained"
    save_file(trained, folder / f"{name}.safetensors")
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    (folder / f"{name}.json").write_text(json.dumps({"said": said, "loss": losses[-1]}))


if __name__ == "__main__":
    flags = sys.argv[3:]
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), "--resume" in flags, "--language" in flags)
