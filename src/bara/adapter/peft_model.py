"""Posteriors on PEFT's LoRA: attaching, the layers' forward pass, merging, registration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft import mapping as peft_mapping
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer, _ConvNd
from torch import nn

from bara.adapter.elbo import Elbo
from bara.adapter.heads import add_heads, in_heads
from bara.adapter.layer import RankSpaceVariant, adapted_layers, posteriors
from bara.errors import BaraError
from bara.posteriors.config import BayesianConfig
from bara.posteriors.rank_space import Granularity
from bara.posteriors.registry import Family, family_of, for_each_family, import_families


class BayesianLoraModel(LoraModel):
    """PEFT's `LoraModel` with a posterior on every adapted layer."""

    @property
    def elbo(self) -> Elbo:
        return Elbo.attached(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT calls self.model.forward, which would go past the hooks that collect the KL
        return self.model(*args, **kwargs)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        assert isinstance(config, BayesianConfig)
        layers = list(adapted_layers(model, adapter_name))
        config.set_by_layers(len(layers))
        for _, _, posterior in layers:
            posterior.start_values()
        if (schedule := config.loss_schedule()) is not None:
            self.elbo.schedules[adapter_name] = schedule
            for _, _, posterior in layers:
                posterior.schedule = schedule
        if (head := family_of(config).head) is not None:
            add_heads(model, adapter_name, head, config, self.elbo)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        if in_heads(key, getattr(peft_config, "heads", ())):
            return False
        return LoraModel._check_target_module_exists(peft_config, key)

    def _create_and_replace(  # type: ignore[override]
        self,
        lora_config: BayesianConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        granularity = resolve_granularity(lora_config, self.model)
        base = target.get_base_layer() if isinstance(target, LoraLayer) else target
        if parameter_name is not None or isinstance(base, (nn.Embedding, nn.MultiheadAttention)):
            raise BaraError(
                f"{type(lora_config).__name__} cannot adapt {current_key} ({type(base).__name__}): "
                "target linear and convolution layers only (exclude_modules leaves this one out)."
            )
        super()._create_and_replace(
            lora_config,
            adapter_name,
            target,
            target_name,
            parent,
            current_key,
            parameter_name=parameter_name,
        )
        layer = parent.get_submodule(target_name)
        assert isinstance(layer, LoraLayer)
        if lora_config.granularity == "auto" and isinstance(layer, _ConvNd):
            granularity = "sequence"  # a gate per image, not per pixel
        elbo = self.elbo
        elbo.configs[adapter_name] = lora_config
        frozen = {adapter_name: lora_config.FROZEN}
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, **frozen}
        variant = RankSpaceVariant(current_key, elbo)
        layer.lora_variant[adapter_name] = variant
        with torch.random.fork_rng(devices=[]):  # a seed gives all layers the A of plain LoRA
            family = family_of(lora_config)
            posterior = family.posterior(lora_config, layer.r[adapter_name], granularity)
            variant.init(layer, adapter_name, posterior)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(layer.active_adapters, inference_mode=lora_config.inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        elbo = self.elbo
        elbo.adapter_names = None if names is None else tuple(names)
        try:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        finally:
            elbo.adapter_names = None

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.elbo.configs.pop(adapter_name, None)
        self.elbo.schedules.pop(adapter_name, None)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Refuses before the first layer is changed, not in the middle."""
        for module in self.model.modules():
            for name in adapter_names or self.active_adapters:
                if isinstance(module, LoraLayer) and name in module.lora_variant:
                    posteriors(module)[name].mean_scale()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of adapters has no posterior of the same family."""
        raise BaraError(
            "Bayesian adapters cannot be combined into a weighted one: the sum has no posterior of "
            "the same family. Activate several with set_adapter([...]), or merge them one by one."
        )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("merge", args[0] if args else True):
            self._check_mergeable(kwargs.get("adapter_names"))
        # unlike its annotation, PEFT's method returns the model
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        self.elbo.detach(model)
        return model


def resolve_granularity(config: BayesianConfig, model: nn.Module) -> Granularity:
    """What the config's granularity means on this model.

    Raises:
        BaraError: sequence granularity on a model that generates.
    """
    can_generate = getattr(model, "can_generate", None)
    generates = config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or bool(
        callable(can_generate) and can_generate()
    )
    if generates and config.granularity == "sequence":
        raise BaraError(
            "granularity='sequence' pools over the whole input, which would show a language model "
            "the future it is to predict. Use granularity='token' (or leave it at 'auto')."
        )
    if config.granularity != "auto":
        return config.granularity
    return "token" if generates else config.DEFAULT_GRANULARITY


def enter_into_peft(family: Family) -> None:
    """Enters a family into PEFT's type mappings, so that PEFT builds, saves and loads it."""
    name: Any = family.config.ABOUT.peft_type
    peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = family.config
    peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = BayesianLoraModel
    peft_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = BayesianLoraModel.prefix


import_families()
for_each_family(enter_into_peft)
