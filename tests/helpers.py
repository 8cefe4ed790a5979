"""Small models and adapters for the tests of the core."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from bara import (
    BaloraConfig,
    BaraConfig,
    BayesianCallback,
    BlobConfig,
    CloraConfig,
    McDropoutConfig,
    RankwiseConfig,
    ScalablConfig,
    SgpLoraConfig,
)

CONFIGS = {
    "bara": BaraConfig,
    "balora": BaloraConfig,
    "blob": BlobConfig,
    "scalabl": ScalablConfig,
    "rankwise": RankwiseConfig,
    "clora": CloraConfig,
    "sgp-lora": SgpLoraConfig,
    "mc-dropout": McDropoutConfig,
}


def granular(method: str, granularity: str) -> dict[str, str]:
    """The option, for the families whose posterior depends on the input."""
    return {"granularity": granularity} if method in ("bara", "balora", "clora") else {}


class TinyNet(nn.Module):
    """One linear layer to adapt, between nothing and a mean-squared error."""

    def __init__(self, inputs: int = 6, outputs: int = 5) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.layer(x)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": (logits - labels).square().mean()}


class TinyConv(nn.Module):
    """A convolution to adapt, pooled to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.conv(pixel_values).relu().mean(dim=(2, 3)))
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
"""Of a tiny decoder."""


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | options)))


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    config.pad_token_id = 0
    return GPT2LMHeadModel(config)


def adapt(model: nn.Module, method: str = "bara", seed: int = 0, **options: Any) -> PeftModel:
    """A model with an adapter of rank 4 on its attention, N = 50."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "num_observations": 50} | options
    return get_peft_model(model, CONFIGS[method](**options))


QUICK = ("global_logit", "gate_weight", "gate_bias", "noise_logit")
"""BaRA's parameters that are a hundredth of a logit: a fifth of the way moves them far enough."""


def stir(model: nn.Module, scale: float = 0.3, seed: int = 1) -> nn.Module:
    """Moves every trainable parameter away from where it starts, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = 0.2 if name.endswith(QUICK) else 1.0
                parameter += part * scale * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients that there are, by parameter, on the CPU."""
    named = model.named_parameters()
    return {name: p.grad.clone().cpu() for name, p in named if p.grad is not None}


def train_log(model: nn.Module, rows: Any, folder: Path, **options: Any) -> list[dict[str, float]]:
    """Trains with `Trainer` and the callback; what was logged in every step."""
    arguments = TrainingArguments(
        str(folder),
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[BayesianCallback()])
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def layer_posterior(model: nn.Module) -> tuple[Any, Any]:
    """The first adapted layer and its posterior."""
    layer = next(m for m in model.modules() if hasattr(m, "lora_posterior"))
    return layer, layer.lora_posterior["default"]


def balora_network(posterior: Any, features: Tensor) -> Tensor:
    """What BaLoRA's network makes of normalised features, (..., 1)."""
    hidden = features @ posterior.hidden_weight.T + posterior.hidden_bias
    return torch.tanh(hidden) @ posterior.output_weight.T + posterior.output_bias


def start_ray(**options: Any) -> Any:
    """A Ray cluster on this machine alone, as a context, with this process's import path."""
    import ray

    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return ray.init(
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"worker_niceness": 0},
        runtime_env={"env_vars": environment},
        **options,
    )
