"""The ranks of a plain LoRA adapter, from the effective ranks of a Bayesian one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from bara.adapter.inspection import bayesian_adapter, rank_fields
from bara.adapter.layer import adapted_layers
from bara.errors import BaraError
from bara.ranks.effective_rank import EffectiveRank


@dataclass(frozen=True)
class RankRecommendation:
    """What to give `peft.LoraConfig` for a plain adapter with the ranks that a Bayesian one uses.

    Attributes:
        r: the largest rank of a layer.
        lora_alpha: for the scaling that the Bayesian adapter has.
        rank_pattern: ranks of the layers that have another than `r`, as PEFT reads them.
        alpha_pattern: theirs, so that every layer keeps its scaling.
        parameters: of the A and B of such an adapter.
        full_parameters: of the A and B of the adapter that was measured.
    """

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    parameters: int
    full_parameters: int

    def config_options(self) -> dict[str, Any]:
        """The options for `LoraConfig(**options)`, or `method_options` of a recipe."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }

    @property
    def saved(self) -> float:
        """Share of the measured adapter's A and B that the recommended one does without."""
        return 1 - self.parameters / self.full_parameters

    def __str__(self) -> str:
        return (
            f"r={self.r}, {len(self.rank_pattern)} layers with less; {self.parameters:,} "
            f"parameters instead of {self.full_parameters:,} ({self.saved:.0%} saved)"
        )


def recommend_ranks(model: nn.Module, rank: EffectiveRank) -> RankRecommendation:
    """The rank of every layer for a plain LoRA adapter: its mean effective rank, rounded up.

    Args:
        model: with the Bayesian adapter that was measured; give it more rank than it needs.
        rank: what `effective_rank(model, data)` returned.

    Raises:
        BaraError: no Bayesian adapter is active, the ranks are of another model, or every factor
            counts in every layer, as with a method without gates.
    """
    adapter = bayesian_adapter(model, "recommend_ranks")
    layers = {name: layer for name, layer, _ in adapted_layers(model, adapter)}
    if set(layers) != set(rank.layers):
        raise BaraError("recommend_ranks needs the ranks of this model: the layers differ.")
    # 1e-4: a sum of probabilities that are 1 but for rounding is no further factor
    means = (math.ceil(mean - 1e-4) for mean in rank.per_layer.tolist())
    chosen = {
        name: min(most, max(1, mean))
        for name, most, mean in zip(rank.layers, rank.max_rank, means, strict=True)
    }
    if all(chosen[name] == most for name, most in zip(rank.layers, rank.max_rank, strict=True)):
        raise BaraError(
            "nothing to recommend: the adapter uses its whole rank in every layer; its method has "
            "no gates, or it needs more rank (train with --method bara and a larger --rank)"
        )
    per_factor = {
        name: sum(part[adapter].weight.numel() for part in (layer.lora_A, layer.lora_B))
        // layer.r[adapter]
        for name, layer in layers.items()
    }
    scaled = {name: (chosen[name], layer.scaling[adapter]) for name, layer in layers.items()}
    config: Any = model.peft_config[adapter]  # type: ignore[index]
    return RankRecommendation(
        **rank_fields(scaled, config.use_rslora),
        parameters=sum(chosen[name] * count for name, count in per_factor.items()),
        full_parameters=sum(layer.r[adapter] * per_factor[name] for name, layer in layers.items()),
    )
