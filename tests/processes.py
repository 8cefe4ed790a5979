"""What one process, or each of two, trains: run by tests/test_processes.py.

torchrun --nproc-per-node 2 tests/processes.py RESULTS
accelerate launch --multi_gpu --num_processes 2 tests/processes.py RESULTS CASE ...
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import bara
from bara.adapter.elbo import elbo_of
from bara.draws.draws import FreshNoise
from conftest import tiny_bert_config
from helpers import CONFIGS, adapt, stir, tiny_llama

ROWS = 37
CASES = ("model", "own loss", "smoothing", "sft")
ACCELERATED = ("model", "sft")
"""Those that `accelerate launch` starts too."""


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

        from language_models import word_tokenizer

        kind, arguments = trl.SFTTrainer, trl.SFTConfig
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
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "n": model.peft_config["default"].resolved.num_observations,
        "loss": [row["loss"] for row in logged],
        "kl": [row["kl_global"] for row in logged],
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


Step = tuple[Tensor, dict[str, Tensor]]
"""The loss of a step and its gradients by parameter, both of the whole batch and on the CPU."""


def differentiated(model: nn.Module, inputs: dict[str, Tensor], share: int = 1) -> Step:
    """One draw's ELBO, of which these inputs are a part."""
    items = batch()["labels"][:, 1:].ne(-100).sum().to(inputs["labels"].device)
    with bara.sampling(model, seed=0):
        loss = share * model(**inputs, num_items_in_batch=items).loss
        loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {name: whole(gradient).cpu() for name, gradient in named.items()}


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(method: str, checkpointing: bool, device: str = "cpu") -> Step:
    """A step with every block and the model sharded over the processes."""
    model = adapted(method).to(device)
    if checkpointing:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    processes = dist.get_world_size()
    mesh = init_device_mesh(device, (processes,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rows = {name: value.chunk(processes)[dist.get_rank()] for name, value in batch().items()}
    part = {name: value.to(device) for name, value in rows.items()}
    loss, found = differentiated(model, part, share=processes)
    dist.all_reduce(loss)
    return loss.cpu() / processes, found


def sharded_alone(method: str, checkpointing: bool, device: str, folder: Path) -> Step:
    """The same in a group of this process alone."""
    dist.init_process_group(
        {"cpu": "gloo", "cuda": "nccl"}[device],
        init_method=f"file://{folder / 'group'}",
        rank=0,
        world_size=1,
    )
    try:
        return sharded(method, checkpointing, device)
    finally:
        dist.destroy_process_group()


def require_same(found: Step, expected: Step) -> None:
    """Fails unless two steps are the same, up to rounding."""
    torch.testing.assert_close(found[0], expected[0].cpu(), rtol=1e-4, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max()
        assert (found[1][name] - gradient).abs().max() <= 1e-4 * scale + 1e-6, name


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


def main(folder: Path, *cases: str) -> None:
    """All there is to find, or what these cases train."""
    results: dict[str, Any] = {
        case: trained(case, folder / case, dist.get_world_size() if dist.is_initialized() else 2)
        for case in cases or CASES
    }
    if not cases:
        results |= measured()
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def measured() -> dict[str, Any]:
    """What is not a training."""
    torch.manual_seed(7)
    noise = FreshNoise(1000, torch.device("cpu"))
    rows = [noise.normal("", ()), noise.uniform("", ()), noise.sign(()), noise.shared((1000,))]
    states = gather_object([torch.get_rng_state()])
    labels = [told(), torch.arange(40) % 2]  # process 1 alone would have a slower head
    return {
        "noise": torch.tensor(gather_object([torch.stack(rows).tolist()])),
        "states": states,
        "fused": fresh(True),
        "alone": fresh(False),
        "scales": gather_object([scale(labels[dist.get_rank()])]),
        "sharded": {method: sharded(method, False) for method in CONFIGS},
        "checkpointed": sharded("bara", True),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
