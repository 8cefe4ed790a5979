"""What every method computes on small fixed models: written down once, and compared ever after.

`python tests/behaviour.py` writes `tests/data/behaviour.json`. A change of the code's structure
must not change a number in it; a change of a method's mathematics does, and writes it anew with
a reason in its commit. With `BARA_EXACT=1` the test asks for the same bits, which only the machine
that wrote the file can give.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import bara
from bara.adapter.layer import adapted_layers
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.finetuning.task_inputs import predict_table
from bara.methods.recipe import TrainRecipe
from conftest import VOCABULARY, tiny_bert_config
from helpers import CONFIGS, TinyConv, gradients, tiny_llama

FILE = Path(__file__).parent / "data" / "behaviour.json"
FAMILIES = {**CONFIGS, "certified": bara.CertifiedConfig}
OPTIONS: dict[str, dict[str, Any]] = {
    "bara-sequence": {"granularity": "sequence"},
    "bara-no-local": {"local_gate": False, "prior_std": None},
}
"""Further settings of a family, named after it."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inputs_of(kind: str) -> dict[str, Tensor]:
    """A batch of three inputs with padding, where the model has it, and labels."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.tensor([0, 2, 1])
    if kind == "conv":
        return {"pixel_values": torch.randn(3, 3, 5, 5, generator=generator), "labels": labels}
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = mask[2, 5:] = 0
    size = len(VOCABULARY) if kind == "bert" else 64
    ids = torch.randint(3, size, (3, 7), generator=generator) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels if kind == "bert" else ids.masked_fill(mask == 0, -100),
    }


def model_of(kind: str, name: str, dtype: torch.dtype) -> PeftModel:
    """A base model with the adapter, moved away from where it starts."""
    torch.manual_seed(0)
    base: nn.Module
    if kind == "bert":
        base = BertForSequenceClassification(
            tiny_bert_config(num_labels=3, initializer_range=0.2, hidden_dropout_prob=0.0)
        )
    else:
        base = tiny_llama(initializer_range=0.2) if kind == "llama" else TinyConv()
    targets = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "conv": ["conv"]}[kind]
    options = {"r": 4, "lora_alpha": 8, "num_observations": 50, "target_modules": targets}
    options |= {"task_type": {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "conv": None}[kind]}
    family = name if name in FAMILIES else name.partition("-")[0]
    model = get_peft_model(base.to(dtype), FAMILIES[family](**options, **OPTIONS.get(name, {})))
    if family == "bara":  # the records are of a KL that the layers share, whatever the steps
        written: Any = model.peft_config["default"]
        layers = sum(1 for _ in adapted_layers(model, "default"))
        written.kl_weight = min(1.0, 3 / layers)
        written.local_kl_weight = 0.018 / layers
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.02 if "posterior" in path or "spread" in path else 0.3
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (scale * noise).to(parameter.dtype)
    return model


def family_record(kind: str, name: str, dtype: str) -> dict[str, list[float]]:
    """A training step, the mean mode, draws, ranks and predictions of one adapter."""
    model = model_of(kind, name, DTYPES[dtype])
    batch = inputs_of(kind)
    if kind == "conv":
        batch["pixel_values"] = batch["pixel_values"].to(DTYPES[dtype])
    record: dict[str, list[float]] = {}
    model.train()
    for step, progress in enumerate((0.3, 0.9)):
        bara.set_progress(model, progress, num_steps=100)
        model.zero_grad()
        torch.manual_seed(5)
        output = model(**batch)
        output["loss"].backward()
        record[f"loss {step}"] = [output["loss"].item()]
        record[f"terms {step}"] = list(bara.kl_terms(model).values())
        record[f"gradients {step}"] = [
            projection(name, gradient) for name, gradient in sorted(gradients(model).items())
        ]
    model.eval()
    labels = batch.pop("labels")
    with torch.no_grad():
        record["mean"] = flat(model(**batch)["logits"])
        with bara.sampling(model, num_draws=2, seed=7):
            doubled = {
                key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in batch.items()
            }
            record["draws"] = flat(model(**doubled)["logits"])
    if kind != "llama":
        predictive = bara.predict(model, {**batch, "labels": labels}, num_draws=3, seed=2)
        record["probabilities"] = flat(predictive.probs)
        record["epistemic"] = flat(predictive.epistemic_uncertainty)
    rank = bara.effective_rank(model, batch, num_draws=2)
    assert rank.draws is not None
    record["rank"] = [*flat(rank.soft), *flat(rank.draws)]
    return record


def method_record(name: str) -> dict[str, list[float]]:
    """What a method predicts after a short training through the recipe, saved and loaded."""
    texts = ["good film", "bad plot", "the food was great", "it was awful", "a fine film .", "poor"]
    table = Dataset.from_dict({"text": texts * 2, "label": ["good", "bad"] * 6})
    with tempfile.TemporaryDirectory() as folder:
        model_folder = write_model(Path(folder) / "model")
        recipe = TrainRecipe.from_dict(
            {
                "model": str(model_folder),
                "output": str(Path(folder) / "adapter"),
                "method": name,
                "training": {
                    "num_train_epochs": 2,
                    "per_device_train_batch_size": 4,
                    "use_cpu": True,
                    "disable_tqdm": True,
                    "save_strategy": "no",
                },
            }
        )
        if name == "ensemble":
            recipe.method_options["num_members"] = 2
        if name.startswith("bara"):  # as above, for 6 layers
            whole = {"kl_weight": 3 / 6, "local_kl_weight": 0.018 / 6, "init_noise": 0.5}
            recipe.method_options |= whole
        trained = finetune(recipe, table, table if name.endswith("temperature") else None)
        model, tokenizer, task = load_adapter(trained, device="cpu")
        predictive = predict_table(
            model, tokenizer, task, table, num_draws=3, seed=1, progress=False
        )
    return {
        "probabilities": flat(predictive.probs),
        "epistemic": flat(predictive.epistemic_uncertainty),
    }


def write_model(folder: Path) -> Path:
    """A folder with a tiny classifier and its tokeniser."""
    from transformers import BertTokenizerFast

    torch.manual_seed(0)
    BertForSequenceClassification(
        tiny_bert_config(num_labels=3, initializer_range=0.2, hidden_dropout_prob=0.0)
    ).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), "utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    return folder


def projection(name: str, gradient: Tensor) -> float:
    """A number that any change of the gradient changes."""
    generator = torch.Generator().manual_seed(len(name))
    return float((gradient.double() * torch.randn(gradient.shape, generator=generator)).sum())


def flat(values: Tensor) -> list[float]:
    """The values themselves, or of many their products with 16 fixed random vectors."""
    flat = values.double().flatten()
    if len(flat) > 100:
        generator = torch.Generator().manual_seed(len(flat))
        flat = torch.randn(16, len(flat), generator=generator, dtype=torch.float64) @ flat
    return flat.tolist()


def cases() -> list[str]:
    """Names of all records: `family model dtype`, and `method name`."""
    names = [
        f"{name} {kind} {dtype}"
        for name in [*FAMILIES, *OPTIONS]
        for kind in ("bert", "llama", "conv")
        for dtype in DTYPES
        if not (name in ("certified", "bara-sequence") and kind != "bert")
    ]
    methods = ("lora", "full", "adalora", "bara", "balora", "blob", "scalabl", "rankwise")
    methods += ("mc-dropout", "ensemble", "tfb", "ivon", "monteclora", "pvera", "bara+temperature")
    return names + [f"method {name}" for name in methods]


def record_of(case: str) -> dict[str, list[float]]:
    """The record by its name."""
    if case.startswith("method "):
        return method_record(case.removeprefix("method "))
    name, kind, dtype = case.split(" ")
    return family_record(kind, name, dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.parent.mkdir(exist_ok=True)
    records = {case: record_of(case) for case in cases()}
    FILE.write_text(json.dumps(records, indent=0) + "\n", "utf-8")
    print(f"{len(records)} records, {FILE.stat().st_size / 1e3:.0f} kB in {FILE}")
