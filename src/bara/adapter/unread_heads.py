"""Heads of a loaded adapter that nobody read.

Earlier versions of transformers (5.16, 5.17) attach an adapter with its heads and then load the
layers' tensors alone, without a word. Their loading calls nothing of ours after that, so that the
first forward pass has to tell.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from bara.adapter.heads import HEAD_CONTAINER
from bara.errors import BaraError

CONTAINERS = (HEAD_CONTAINER, "modules_to_save")
"""Where heads are, ours and PEFT's."""


@dataclass(eq=False)
class RequireRead:
    """Before a model's first pass: refuses it if transformers left heads as they were made.

    Attributes:
        made: the heads' parameters by path, with their versions, both as they were made.
        handle: of this hook.
    """

    made: dict[str, tuple[nn.Parameter, int]]
    handle: Any = field(init=False)

    @torch.compiler.disable
    def __call__(self, model: nn.Module, _: tuple[Any, ...]) -> None:
        if getattr(model, "_hf_peft_config_loaded", False):  # PEFT itself reads them
            now = dict(model.named_parameters())
            for path, (made, version) in self.made.items():
                if now.get(path) is made and made._version == version:
                    raise BaraError(
                        f"transformers {transformers.__version__} did not read {path}, which is at "
                        "random numbers: load the adapter with bara.load_adapter or "
                        "peft.PeftModel.from_pretrained, or install transformers 5.24 or later."
                    )
        self.handle.remove()


def require_read(model: nn.Module, adapter: str) -> None:
    """Has the model's first pass check that the heads of an adapter have been loaded by then."""
    parts = tuple(f".{container}.{adapter}." for container in CONTAINERS)
    named = model.named_parameters()
    made = {path: (p, p._version) for path, p in named if any(part in path for part in parts)}
    if made:
        hook = RequireRead(made)
        hook.handle = model.register_forward_pre_hook(hook)
