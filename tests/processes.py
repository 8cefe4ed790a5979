"""What one process, or each of two, trains: run by tests/test_processes.py.

torchrun --nproc-per-node 2 tests/processes.py RESULTS
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import bara
from bara.adapter.elbo import elbo_of
from bara.draws.draws import FreshNoise
from conftest import tiny_bert_config
from helpers import CONFIGS, adapt, gradients, stir, tiny_llama

ROWS = 37
CASES = ("model", "own loss", "smoothing", "sft")


class SmoothedTrainer(bara.KLMixin, Trainer):
    """A trainer whose loss is not the model's."""


def texts() -> list[dict[str, list[int]]]:
    """Rows whose numbers of labels differ."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(ROWS):
        ids = torch.randint(1, 64, (8,), generator=generator)
        labels = ids.where(torch.arange(8) > number % 7, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def trained(case: str, folder: Path, processes: int) -> dict[str, Any]:
    """N, the logs and the trained tensors of three steps whose batches are those of all processes,
    under a fixed draw."""
    options: dict[str, Any] = {"num_observations": None, "warmup": 0.0, "task_type": "CAUSAL_LM"}
    model = stir(adapt(tiny_llama(), **options), 0.1)
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 6 // processes,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",  # Adam takes rounding errors for gradients
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    common |= {"label_smoothing_factor": 0.2} if case == "smoothing" else {}
    kind, arguments, more = Trainer, TrainingArguments, {}
    if case == "smoothing":
        kind = SmoothedTrainer
    elif case == "own loss":
        more = {"compute_loss_func": bara.elbo_loss(model, shifted_nll)}
    elif case == "sft":
        import trl

        class SFT(bara.KLMixin, trl.SFTTrainer):
            pass

        from language_models import word_tokenizer

        kind, arguments = SFT, trl.SFTConfig
        common |= {"bf16": False, "gradient_checkpointing": False}
        more = {"processing_class": word_tokenizer()}
    trainer = kind(
        model=model,
        args=arguments(**common),
        train_dataset=Dataset.from_list(texts()),
        callbacks=[bara.BayesianCallback()],
        **more,
    )
    with bara.sampling(model, seed=1):
        trainer.train()
    return {
        "n": model.peft_config["default"].resolved.num_observations,
        "loss": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "weights": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
    }


def shifted_nll(outputs: Any, labels: Tensor) -> Tensor:
    """A causal language model's loss."""
    return nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )


def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (4, 8), generator=torch.Generator().manual_seed(8))
    ids[0, -2:] = 0
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.where(ids != 0, -100),
    }


def adapted(method: str) -> nn.Module:
    model = stir(adapt(tiny_llama(), method), 0.1).train()
    bara.set_progress(model, 1.0, 100)
    return model


def differentiated(model: nn.Module, inputs: dict[str, Tensor], share: int) -> dict[str, Tensor]:
    """Gradients of one draw's ELBO, of which these inputs are a part."""
    items = batch()["labels"][:, 1:].ne(-100).sum()
    with bara.sampling(model, seed=0):
        (share * model(**inputs, num_items_in_batch=items).loss).backward()
    return gradients(model)


def sharded(method: str, checkpointing: bool) -> dict[str, Tensor]:
    """Gradients of one step with every block and the whole sharded over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = adapted(method)
    if checkpointing:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rank = dist.get_rank()
    part = {name: value.chunk(2)[rank] for name, value in batch().items()}
    found = differentiated(model, part, share=2)
    return {name: gradient.full_tensor() for name, gradient in found.items()}


def fresh(fuse: bool) -> list[list[float]]:
    """What a training pass makes of the same input in every process, all seeded alike."""
    model = adapted("bara")
    elbo_of(model).fuse = fuse
    torch.manual_seed(7)
    return gather_object([model(**batch()).logits.flatten()[:20].tolist()])


def scale(labels: Tensor) -> float | None:
    """What a process whose examples have these labels has its head scaled by."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert_config(num_labels=2))
    model = adapt(model, task_type="SEQ_CLS", target_modules=["query"])
    ids = torch.randint(5, 20, (40, 7), generator=torch.Generator().manual_seed(3))
    return bara.scale_head(model, [{"input_ids": ids, "labels": labels}])


def told() -> Tensor:
    """Classes that the frozen features tell apart."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert_config(num_labels=2)).eval()
    ids = torch.randint(5, 20, (40, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x = model.bert(ids).pooler_output
    return ((x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0))[2][0] > 0).long()


def main(folder: Path) -> None:
    results: dict[str, Any] = {
        case: trained(case, folder / case, dist.get_world_size() if dist.is_initialized() else 2)
        for case in CASES
    }
    torch.manual_seed(7)
    noise = FreshNoise(1000, torch.device("cpu"))
    rows = [noise.normal("", ()), noise.uniform("", ()), noise.sign(()), noise.shared((1000,))]
    results["noise"] = torch.tensor(gather_object([torch.stack(rows).tolist()]))
    results["states"] = gather_object([torch.get_rng_state()])
    results["fused"], results["alone"] = fresh(True), fresh(False)
    labels = [told(), torch.arange(40) % 2]  # process 1 alone would have a slower head
    results["scales"] = gather_object([scale(labels[dist.get_rank()])])
    results["sharded"] = {method: sharded(method, False) for method in CONFIGS}
    results["checkpointed"] = sharded("bara", True)
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
