"""Where the inputs of a batch are in what a layer reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Reads = Literal["inputs first", "time first", "positions too"]
"""What a linear layer reads: (inputs, tokens, features) or (tokens, inputs, features); or, besides
the former, (1, positions, features) that all inputs share."""
TIME_FIRST = {
    "modeling_fsmt.Attention",
    "modeling_fsmt.DecoderLayer",
    "modeling_fsmt.EncoderLayer",
    "modeling_led.LEDEncoderSelfAttention",
    "modeling_longformer.LongformerSelfAttention",
    "modeling_xlnet.XLNetFeedForward",
}
"""Modules of transformers whose linear layers read the tokens first."""
POSITIONS = {
    "modeling_deberta.DisentangledSelfAttention",
    "modeling_deberta_v2.DisentangledSelfAttention",
}
"""Those whose linear layers also read relative positions."""
ROUTED = {
    "modeling_nllb_moe.NllbMoeExperts",
    "modeling_switch_transformers.SwitchTransformersExperts",
}
"""Those whose linear layers read some tokens of some inputs, (tokens, features)."""


def reads(model: nn.Module, layer: str) -> Reads | None:
    """What a linear layer of this name reads; None for tokens of several inputs together."""
    parents = [layer.rsplit(".", depth)[0] for depth in range(1, layer.count(".") + 1)]
    classes = [type(model.get_submodule(parent)) for parent in parents]
    inside = {f"{c.__module__.rpartition('.')[2]}.{c.__qualname__}" for c in classes}
    if inside & ROUTED:
        return None
    if inside & TIME_FIRST:
        return "time first"
    return "positions too" if inside & POSITIONS else "inputs first"


@dataclass(frozen=True)
class Layout:
    """How a layer arranges what its A gives, which a posterior sees as (rows, positions, r).

    Attributes:
        shape: of A x: (..., r), or (B, r, ...) of a convolution.
        convolution: which of them.
        rows: inputs of the batch; 0 if unknown.
    """

    shape: torch.Size
    convolution: bool
    rows: int

    def flatten(self, u: Tensor) -> Tensor:
        """A x as (rows, positions, r)."""
        if self.convolution:
            return u.flatten(2).transpose(1, 2)
        # windows or flattened tokens of one input follow each other
        rows = self.rows if self.rows and u.shape[0] % self.rows == 0 else u.shape[0]
        return u.reshape(rows, -1, u.shape[-1])

    def restore(self, flat: Tensor) -> Tensor:
        """Back from (rows, positions, features)."""
        if self.convolution:
            return flat.transpose(1, 2).reshape(self.shape)
        return flat.reshape(*self.shape[:-1], flat.shape[-1])
