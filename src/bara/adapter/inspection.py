"""What pruning and export share: one adapter of a model, its copy, its ranks, its place on disk."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from bara.errors import BaraError
from bara.posteriors.config import BayesianConfig


def bayesian_adapter(model: nn.Module, what_for: str) -> str:
    """Name of the one active adapter, which must be Bayesian and not merged.

    Raises:
        BaraError: it is not; the message says what it is.
    """
    active = one_adapter(model, what_for)
    assert isinstance(model, PeftModel)
    config = model.peft_config[active]
    if not isinstance(config, BayesianConfig):
        method = getattr(config.peft_type, "value", config.peft_type)
        raise BaraError(f"{what_for} needs a Bayesian adapter; this one's method is {method}.")
    return active


def one_adapter(model: nn.Module, what_for: str) -> str:
    """Name of the one active adapter, of whatever method, which must not be merged.

    Raises:
        BaraError: there is none or several, or it is merged.
    """
    if not isinstance(model, PeftModel):
        raise BaraError(f"{what_for} needs a PEFT model, got {type(model).__name__}.")
    active = list(model.active_adapters)
    if len(active) != 1:
        raise BaraError(f"{what_for} needs one active adapter, not {len(active)} (set_adapter).")
    if any(isinstance(module, LoraLayer) and module.merged for module in model.modules()):
        raise BaraError(f"{what_for} needs an adapter that is not merged: call unmerge_adapter().")
    return active[0]


def passed_by(module: object) -> bool:
    """Whether forward passes go past a module's adapters: disabled, or merged into its weight."""
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and bool(
        module.disable_adapters or getattr(module, "merged", False)
    )


def require_untied(model: nn.Module, adapters: Collection[str]) -> None:
    """Refuses to merge into a weight that another module reads too, and would read merged.

    Args:
        model: with its adapters.
        adapters: names of those that are to be merged.

    Raises:
        BaraError: an adapted layer's weight is another module's, such as that of a tied embedding.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    readers: dict[nn.Parameter, dict[nn.Module, str]] = {}
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        reader = parent if isinstance(modules.get(parent), LoraLayer) else name  # of a base layer
        for kind, parameter in module.named_parameters(recurse=False):
            if kind == "weight":
                readers.setdefault(parameter, {}).setdefault(modules[reader], reader)
    for names in readers.values():
        for module, layer in names.items():
            merged = isinstance(module, LoraLayer) and not module.scaling.keys().isdisjoint(
                adapters
            )
            if merged and len(names) > 1:
                other = next(name for name in names.values() if name != layer)
                raise BaraError(
                    f"{layer} cannot be merged: its weight is that of {other} too, which would "
                    "change with it. Export it as an adapter (mode mean or draws), or untie the "
                    "two: give the layer a weight of its own, and set tie_word_embeddings=False "
                    "in the model's config."
                )


def frozen_nll(model: nn.Module) -> float | None:
    """What a linear head on the frozen model lost in cross-validation when this model's adapter was
    trained, in nats; None where that was not measured."""
    if not isinstance(model, PeftModel) or len(model.active_adapters) != 1:
        return None
    config = model.peft_config[model.active_adapters[0]]
    resolved = config.resolved if isinstance(config, BayesianConfig) else None
    return None if resolved is None else resolved.frozen_nll


def against_frozen(model: nn.Module, nll: float) -> str | None:
    """Whether the adapter is better than a linear head on the frozen model, whose rank is 0, in
    words; None where training did not measure that.

    Args:
        model: with its adapter.
        nll: what the adapter loses, in nats. It compares with the head's where its examples were
            not trained on.
    """
    frozen = frozen_nll(model)
    if frozen is None:
        return None
    verdict = (
        f"this adapter, with {nll:.4f} here, is better if it was not trained on these."
        if nll < frozen
        else "it does as well, so that rank 0 is enough here."
    )
    return (
        f"A linear head on the frozen model had an nll of {frozen:.4f}, cross-validated on the "
        f"training's examples: {verdict}"
    )


def copy_sharing_base(model: PeftModel) -> PeftModel:
    """A copy of the model that shares the frozen base weights with it: only the adapter is new."""
    shared = {
        id(parameter): parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and "lora_" not in name and "modules_to_save" not in name
    }
    return copy.deepcopy(model, shared)


def adapter_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The tensors that PEFT saves for an adapter."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=False
    )
    return tensors


def trained_heads(config: LoraConfig) -> list[str] | None:
    """`modules_to_save`, each once: PEFT appends the heads' names whenever it makes a model."""
    return list(dict.fromkeys(config.modules_to_save)) if config.modules_to_save else None


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of the tensors on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def rank_fields(layers: Mapping[str, tuple[int, float]], use_rslora: bool) -> dict[str, Any]:
    """The fields of a `LoraConfig` that give each layer its rank and leave its scaling alone.

    `r` is the largest rank. PEFT's scaling is alpha / r, or alpha / sqrt(r) with `use_rslora`.

    Args:
        layers: name of each layer -> its rank and its scaling.

    Returns:
        `r`, `lora_alpha`, `rank_pattern` and `alpha_pattern`.
    """
    alphas = {
        name: _whole(scaling * (math.sqrt(rank) if use_rslora else rank))
        for name, (rank, scaling) in layers.items()
    }
    r = max(rank for rank, _ in layers.values())
    alpha = Counter(alphas[name] for name, (rank, _) in layers.items() if rank == r)
    usual = alpha.most_common(1)[0][0]
    # "^" anchors PEFT's pattern: otherwise a name matches every longer name that ends like it
    return {
        "r": r,
        "lora_alpha": usual,
        "rank_pattern": {f"^{name}": rank for name, (rank, _) in layers.items() if rank != r},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != usual},
    }


def _whole(value: float) -> float:
    """The value as a whole number where it is one but for rounding."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value
