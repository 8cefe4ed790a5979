"""The plain LoRA adapters that a posterior becomes: its mean, or some of its draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.nn.functional import pad

from bara.adapter.inspection import (
    adapter_tensors,
    bayesian_adapter,
    copy_sharing_base,
    one_adapter,
    trained_heads,
)
from bara.adapter.layer import CONTAINER, adapted_layers, scaled_columns
from bara.draws.draws import Draws, FixedNoise, draw_source
from bara.errors import BaraError
from bara.methods.weight_draws import WeightDraws
from bara.posteriors.posterior import Posterior

PREFIX = "base_model.model."
FACTORS = (
    (".lora_A.weight", ".lora_B.weight", ".lora_B.bias"),
    (".lora_embedding_A", ".lora_embedding_B", ""),
)
"""How PEFT ends the names of a layer's A, B, and what is added behind B."""


class PlainLora:
    """A model's posterior as plain LoRA adapters.

    Args:
        model: a PEFT model with one active adapter: Bayesian, or LoRA with noise on its weights
            (TFB, Laplace, IVON).
        draws: the seed and the number of the draws; None for the mean alone.
        patterns: keep every layer's own rank and scaling (`rank_pattern`, `alpha_pattern`). Else
            all layers get one rank, padded with zeros, and one scaling, the rest of which is in B:
            servers that read `r` and `lora_alpha` alone are right then.

    Raises:
        BaraError: the model has no such adapter, or draws of a linearised posterior are asked for.
    """

    def __init__(
        self, model: PeftModel, *, draws: tuple[int, int] | None = None, patterns: bool = False
    ) -> None:
        self.model = model
        noise = draw_source(model)
        self.noise = noise if isinstance(noise, WeightDraws) else None
        if self.noise is None:
            self.adapter = bayesian_adapter(model, "export")
        else:
            self.adapter = one_adapter(model, "export")
        if draws and self.noise and self.noise.linearised:
            raise BaraError(
                "this Laplace posterior predicts with a linearised model, which draws of weights "
                "are not: export --mode mean, or give the adapter another posterior (bara "
                "bayesianize --method tfb, or --set subset=last-layer)"
            )
        self.seed, self.count = draws or (0, 1)
        self.drawn = draws is not None
        config: Any = model.peft_config[self.adapter]
        self.original: Any = config
        layers: dict[str, Any] = {
            f"{PREFIX}{name}": layer
            for name, layer in model.get_base_model().named_modules()
            if isinstance(layer, LoraLayer) and self.adapter in layer.scaling
        }
        self.scalings = {n: float(layer.scaling[self.adapter]) for n, layer in layers.items()}
        self.groups = {
            n: getattr(layer.get_base_layer(), "groups", 1) for n, layer in layers.items()
        }
        ranks = {a.shape[0] for key, a in self._tensors(0).items() if key.endswith(_A)}
        self.rank = max(ranks, default=config.r)
        even = len(ranks) == 1 and len(set(self.scalings.values())) == 1
        self.folds = not patterns and not (even and not config.use_rslora)
        if self.folds:  # every group of a convolution has the same part of the rank
            every = math.lcm(*self.groups.values())
            self.rank = math.ceil(self.rank / every) * every
        self.config = self._config(even and not patterns)

    def tensors(self, number: int) -> dict[str, Tensor]:
        """What PEFT saves for the mean, or for a draw, on the CPU."""
        tensors = self._tensors(number)
        if self.folds:
            for name, scaling in self.scalings.items():
                for a, b, bias in FACTORS:
                    if name + a in tensors:
                        tensors[name + a], tensors[name + b] = _padded(
                            tensors[name + a],
                            tensors[name + b] * scaling,
                            self.rank,
                            self.groups[name],
                        )
                    if bias and name + bias in tensors:
                        tensors[name + bias] = tensors[name + bias] * scaling
        return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}

    def models(self) -> Iterator[PeftModel]:
        """The model with each of the adapters in turn: what PEFT makes of the exported files."""
        plain = copy_sharing_base(self.model)
        plain.__dict__.pop("bara_draws", None)
        for _, layer, _ in list(adapted_layers(plain, self.adapter)):
            del layer.lora_variant[self.adapter]
        for number in range(self.count):
            tensors = self._tensors(number)  # with the ranks and the scaling of the layers
            set_peft_model_state_dict(plain, tensors, adapter_name=self.adapter)
            yield plain

    def _config(self, even: bool) -> LoraConfig:
        """The `LoraConfig` of all these adapters."""
        known = [f.name for f in fields(LoraConfig) if f.init]
        values = {name: copy.deepcopy(getattr(self.original, name)) for name in known}
        values |= {"peft_type": None, "init_lora_weights": True, "inference_mode": True}
        values["modules_to_save"] = trained_heads(self.original)
        if self.folds or even:
            alpha = self.rank if self.folds else self.rank * next(iter(self.scalings.values()), 1)
            whole = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha
            values |= {"r": self.rank, "lora_alpha": whole, "use_rslora": False}
            values |= {"rank_pattern": {}, "alpha_pattern": {}}
        return LoraConfig(**values)

    @torch.no_grad()
    def _tensors(self, number: int) -> dict[str, Tensor]:
        draws = Draws(1, self.seed, first=number) if self.drawn else None
        if self.noise is not None:
            with self.noise.drawing(draws):
                saved = adapter_tensors(self.model, self.adapter)
                return {key: tensor.clone() for key, tensor in saved.items()}
        saved = adapter_tensors(self.model, self.adapter)
        tensors = {key: tensor for key, tensor in saved.items() if CONTAINER not in key}
        for name, layer, posterior in adapted_layers(self.model, self.adapter):
            factors = _mean if draws is None else _draw(draws, name)
            a, b = factors(layer, self.adapter, posterior)
            tensors[f"{PREFIX}{name}{FACTORS[0][0]}"] = a
            tensors[f"{PREFIX}{name}{FACTORS[0][1]}"] = b
        return tensors


_A = tuple(a for a, _, _ in FACTORS)


def _padded(a: Tensor, b: Tensor, rank: int, groups: int) -> tuple[Tensor, Tensor]:
    """A (r, ...) and B (d_out, r / groups, ...) with factors of zeros up to a rank.

    A grouped convolution reads the factors of its groups one after the other: each gets as many.
    """
    missing = (rank - a.shape[0]) // groups
    a = a.unflatten(0, (groups, -1))
    a = pad(a, [0, 0] * (a.dim() - 2) + [0, missing]).flatten(0, 1)
    return a, pad(b, [0, 0] * (b.dim() - 2) + [0, missing])


def _mean(layer: Any, adapter: str, posterior: Posterior) -> tuple[Tensor, Tensor]:
    """A and B of the posterior mean."""
    b = scaled_columns(layer.lora_B[adapter], posterior.mean_scale())
    return layer.lora_A[adapter].weight.data, b


def _draw(draws: Draws, name: str) -> Callable[[Any, str, Posterior], tuple[Tensor, Tensor]]:
    """What makes A and B of a draw of the layer called `name`."""

    def factors(layer: Any, adapter: str, posterior: Posterior) -> tuple[Tensor, Tensor]:
        a = layer.lora_A[adapter].weight.data
        noise = FixedNoise(draws, torch.zeros(1, dtype=torch.long, device=a.device), name)
        a, scale = posterior.lora_draw(a, noise)
        return a, scaled_columns(layer.lora_B[adapter], scale)

    return factors
