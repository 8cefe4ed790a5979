"""Heads with a posterior, in the place of PEFT's `modules_to_save`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from bara.adapter.elbo import Elbo
from bara.adapter.peft_020 import read_saved_names
from bara.errors import BaraError
from bara.posteriors.posterior import Kl

HEAD_CONTAINER = "lora_head"
"""Name of the module dict that holds a head's posteriors."""
SAVED_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that PEFT adds to `modules_to_save` by its task type."""
LATE = ("TOKEN_CLS", "QUESTION_ANS")
"""Task types for which it does so only when the adapter is attached."""


class PosteriorHead(nn.Module, BaseTunerLayer):
    """PEFT's view of a head: the base model's layer, and the posterior that replaces it."""

    adapter_layer_names = (HEAD_CONTAINER,)

    def __init__(
        self, layer: nn.Linear, name: str, adapter: str, head: nn.Module, config: Any, elbo: Elbo
    ) -> None:
        super().__init__()
        self.base_layer = layer
        self.name = name
        self.elbo = elbo
        self.lora_head = nn.ModuleDict({adapter: head})
        read_saved_names(self.lora_head)
        self.set_adapter(adapter, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = next((name for name in self.active_adapters if name in self.lora_head), None)
        if self.disable_adapters or adapter is None:
            return self.base_layer(x)
        head: Any = self.lora_head[adapter]
        forward = self.elbo.current()
        if forward is None:
            return head(x, None).to(x.dtype)
        if head.training and torch.is_grad_enabled() and _trainable(head):
            forward.trainable = True
            forward.add(adapter, head, {"parameters": head.kl()}, Kl.of)
        noise = forward.noise(self.name, None, x.shape[0], x.device, head.training)
        return head(x, noise).to(x.dtype)


def _trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def with_late_heads(config: Any) -> list[str] | None:
    """The `modules_to_save` that an adapter is going to have, known before it is attached."""
    given = list(config.modules_to_save or ())
    late = SAVED_HEADS[config.task_type] if config.task_type in LATE else ()
    return given + [name for name in late if name not in given] or None


def in_heads(path: str, heads: Collection[str]) -> bool:
    """Whether the module at a path is one of the heads, or a part of one."""
    return any(f".{name}." in f".{path}." for name in heads)


def add_heads(
    model: nn.Module,
    adapter: str,
    make: Callable[[nn.Linear, Any], nn.Module],
    config: Any,
    elbo: Elbo,
) -> None:
    """Gives every linear layer of the modules called `config.heads` a posterior.

    Args:
        model: the base model.
        adapter: name of the adapter.
        make: of the family, the posterior of a linear layer.
        config: of the adapter.
        elbo: of the model.

    Raises:
        BaraError: such a module has other parameters, or a posterior of another adapter.
    """
    for path, layer in list(model.named_modules()):
        if not in_heads(path, config.heads):
            continue
        if isinstance(layer, PosteriorHead):
            name = config.ABOUT.name
            raise BaraError(f"{path} has a {name} adapter already; use a new base model.")
        if type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            head = PosteriorHead(layer, path, adapter, make(layer, config), config, elbo)
            setattr(model.get_submodule(parent), name, head.train(model.training))
        elif list(layer.parameters(recurse=False)):
            raise BaraError(
                f"{type(config).__name__} cannot train {path} ({type(layer).__name__}): linear "
                "layers only, so that everything that is fitted has a posterior."
            )
