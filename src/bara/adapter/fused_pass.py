"""Which layers take a fused step in a pass, and their preparation (`posteriors/fused`)."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from bara.adapter.forward_pass import ForwardPass
from bara.draws.noise_stack import FixedNoiseStack, FreshNoiseStack
from bara.posteriors.fused import FusedLayer, Stack, stacked_layers
from bara.posteriors.posterior import Posterior

Layers = Mapping[str, tuple[LoraLayer, Posterior]]
"""PEFT's layers with their posteriors, by name."""
Layer = tuple[str, Any, Posterior]
SIBLINGS = {
    name: together
    for together in (
        ("query", "key", "value"),
        ("q", "k", "v"),
        ("q_proj", "k_proj", "v_proj"),
        ("q_lin", "k_lin", "v_lin"),
        ("to_q", "to_k", "to_v"),
        ("q_a_proj", "kv_a_proj_with_mqa"),
        ("gate_proj", "up_proj"),
        ("wi_0", "wi_1"),
        ("w1", "w3"),
    )
    for name in together
}
"""Layers of a module that read the same input, by the names that transformers gives them: the first
makes the projections of all. A layer that reads something else after all makes its own."""


def fused_layer(
    name: str,
    adapter: str,
    layers: Layers,
    forward: ForwardPass,
    dtype: torch.dtype,
) -> FusedLayer | None:
    """One layer of an adapter, prepared together with the others; None if it goes on its own.

    Args:
        name: the layer's.
        adapter: its name.
        layers: what it adapts.
        forward: the pass.
        dtype: of the layers' projections.
    """
    together = forward.fuse and not forward.observers and forward.adapter_names is None
    noise = forward.draws is not None or forward.seed is not None
    # a compiler fuses by itself, and functions of functions need more than a written gradient
    if (
        not (together and noise)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    key = adapter, dtype, torch.is_grad_enabled()
    if key not in forward.fused:
        # not seen by a checkpointed block that this may be called in: it is not run again
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            forward.fused[key] = _prepare(adapter, layers, forward, dtype)
    return forward.fused[key].get(name)


def _prepare(
    adapter: str, layers: Layers, forward: ForwardPass, dtype: torch.dtype
) -> dict[str, FusedLayer]:
    """All layers of an adapter that can be fused, by name."""
    alike: dict[tuple[object, ...], list[Layer]] = defaultdict(list)
    for name, (module, posterior) in layers.items():
        if _can_fuse(module, adapter, posterior, forward):
            weight: Any = module.lora_A[adapter].weight
            kind = type(posterior), posterior.rank, posterior.granularity, posterior.training
            alike[*kind, weight.device, weight.dtype].append((name, module, posterior))
    prepared: dict[str, FusedLayer] = {}
    for group in alike.values():
        stack = _stack(adapter, group, forward, dtype)
        with torch.autocast(stack.a[0].device.type, enabled=False):
            fused = group[0][2].fuse(stack)
            if fused is not None:
                names = [name for name, _, _ in group]
                prepared |= zip(names, stacked_layers(stack, fused), strict=True)
    return prepared


def _stack(
    adapter: str, layers: Sequence[Layer], forward: ForwardPass, dtype: torch.dtype
) -> Stack:
    a, b = (
        [getattr(module, part)[adapter].weight for _, module, _ in layers]
        for part in ("lora_A", "lora_B")
    )
    device: torch.device = a[0].device
    noise: Any
    if forward.draws is not None:
        rows = forward.draws.rows(forward.batch_size, device)
        noise = FixedNoiseStack(forward.draws, rows, [name for name, _, _ in layers])
    else:
        assert forward.seed is not None
        place = zlib.crc32(f"{adapter} {layers[0][0]} {dtype}".encode())
        noise = FreshNoiseStack(len(layers), forward.batch_size, device, forward.seed, place)
    return Stack(
        posteriors=[posterior for _, _, posterior in layers],
        a=a,
        b=b,
        scalings=[module.scaling[adapter] for _, module, _ in layers],
        noise=noise,
        dtype=dtype,
        with_kl=torch.is_grad_enabled() and layers[0][2].training,
        siblings=_siblings(adapter, layers),
    )


def _siblings(adapter: str, layers: Sequence[Layer]) -> list[list[int]]:
    """The layers' numbers, those together that read the same input."""
    found: list[list[int]] = []
    last: object = None
    for i, (name, module, _) in enumerate(layers):
        parent, _, own = name.rpartition(".")
        kind = parent, SIBLINGS.get(own), module.lora_A[adapter].weight.shape
        # an inference tensor is nobody else's (`ForwardPass.input_of`)
        alone = drops_out(module, adapter) or torch.is_inference_mode_enabled()
        if kind == last and not alone:
            found[-1].append(i)
        else:
            found.append([i])
        last = None if alone or kind[1] is None else kind
    return found


def drops_out(module: LoraLayer, adapter: str) -> bool:
    """Whether LoRA's dropout makes of the layer's input one of its own."""
    dropout: Any = module.lora_dropout[adapter]
    return dropout.training and not isinstance(dropout, nn.Identity)


def _can_fuse(module: LoraLayer, adapter: str, posterior: Posterior, forward: ForwardPass) -> bool:
    """Whether a layer is what its fused step takes it for."""
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    family: Any = type(posterior)
    return (
        (forward.draws is not None or posterior.training)
        and list(module.active_adapters) == [adapter]
        and all(_is_plain(part) for part in (a, b))
        and not _is_hooked(posterior)
        and _fuses_what_it_computes(family)
    )


def _is_plain(layer: nn.Module) -> bool:
    """Whether a module is x W^T and nothing else, with a weight that is whole in memory: a sharded
    one is of another type, an offloaded one is nowhere outside of its layer's call."""
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and type(layer.weight) is nn.Parameter
        and not layer.weight.is_meta
        and layer.weight.shape == (layer.out_features, layer.in_features)
        and not _is_hooked(layer)
    )


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says; accelerate replaces `forward`."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    return any(hooks) or bool(module._backward_pre_hooks) or "forward" in vars(module)


@cache
def _fuses_what_it_computes(family: Any) -> bool:
    """Whether `fuse` is not older than `forward`: a subclass may have changed the latter alone."""
    owner = {
        name: next(i for i, cls in enumerate(family.__mro__) if name in vars(cls))
        for name in ("forward", "fuse")
    }
    return owner["fuse"] <= owner["forward"]
