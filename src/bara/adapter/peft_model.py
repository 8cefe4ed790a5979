"""PEFT's LoRA model with posteriors: attaching, saving, merging, registration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftType
from peft import mapping as peft_mapping
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import hotswap
from torch import Tensor, nn

from bara.adapter.elbo import AttachedAdapter, Elbo
from bara.adapter.heads import HEAD_CONTAINER, add_heads, in_heads, with_late_heads
from bara.adapter.inspection import require_untied
from bara.adapter.layer import (
    CONTAINER,
    RankSpaceVariant,
    adapted_layers,
    add_posterior,
    already_there,
    asks_variant,
    posteriors,
    renamed_key,
)
from bara.adapter.layout import reads
from bara.adapter.peft_020 import (
    enter_into_enumeration,
    refuse_conversion,
    refuse_what_is_not_saved,
)
from bara.adapter.scaled_head import restore_head
from bara.adapter.unread_heads import require_read
from bara.errors import BaraError
from bara.posteriors.config import BayesianConfig
from bara.posteriors.posterior import LayerSetup
from bara.posteriors.rank_space import Granularity
from bara.posteriors.registry import Family, family_of, for_each_family, import_families

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class _NewLayer:
    """A LoRA layer that is about to get its posterior.

    Attributes:
        name: in the base model.
        module: PEFT's layer.
        granularity: of its posterior.
        rng_state: torch's generator as it was when the layer's A had been drawn, from which a copy
            draws the posterior: so a seed gives all layers the A of plain LoRA.
    """

    name: str
    module: LoraLayer
    granularity: Granularity
    rng_state: Tensor


class BayesianLoraModel(LoraModel):
    """PEFT's `LoraModel` with a posterior on every adapted layer."""

    @property
    def elbo(self) -> Elbo:
        return Elbo.attached(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT calls self.model.forward, which would go past the hooks that collect the KL
        return self.model(*args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's hook: makes the LoRA layers, then a posterior for each.

        An adapter to train gets a copy of the configuration, so that the numbers in force,
        `resolved`, are not left on the object that the user goes on with; one that is loaded keeps
        the object, as PEFT promises.

        Raises:
            BaraError: the model's layers have a Bayesian adapter of that name already.
        """
        if next(adapted_layers(model, adapter_name), None) is not None:
            raise BaraError(already_there(adapter_name))
        config = self.peft_config[adapter_name]
        assert isinstance(config, BayesianConfig)
        refuse_what_is_not_saved(config)
        if not config.inference_mode:
            config = self.peft_config[adapter_name] = copy.copy(config)
            config.modules_to_save = with_late_heads(config)
        self._new: list[_NewLayer] = []
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        new, self._new = self._new, []
        family = family_of(config)
        linear = sum(isinstance(layer.module.lora_A[adapter_name], nn.Linear) for layer in new)
        convolutions = 1 - linear / len(new) if new else 0.0
        config.resolved = resolved = config.resolve(len(new), convolutions)
        attached = AttachedAdapter(config, resolved)
        self.elbo.adapters[adapter_name] = attached
        empty = init_empty_weights if low_cpu_mem_usage else nullcontext
        for layer in new:
            a, b = (getattr(layer.module, m)[adapter_name].weight for m in ("lora_A", "lora_B"))
            setup = LayerSetup(config, resolved, a, b, layer.granularity)
            with torch.random.fork_rng(devices=[]), empty():
                torch.set_rng_state(layer.rng_state)
                posterior = family.posterior(setup)
            # one that joins a model in evaluation mode draws no noise there
            posterior.train(model.training)
            add_posterior(layer.module, adapter_name, posterior)
            attached.layers[layer.name] = layer.module, posterior
            active = adapter_name in layer.module.active_adapters
            posterior.requires_grad_(active and not config.inference_mode)
        if family.head is not None:
            add_heads(model, adapter_name, family.head, config, self.elbo)
        if config.inference_mode:
            require_read(model, adapter_name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # TRL puts a closure around the forward of the model that it trains. In a copy it would go
        # on to call the original, with the original's adapter and draws.
        for module in self.model.modules():
            if _calls_another(vars(module).get("forward"), module):
                del module.forward

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
        if parameter_name is not None:
            raise BaraError(
                f"{type(lora_config).__name__} cannot adapt the parameter {current_key}: leave "
                "target_parameters out, and target linear and convolution layers (target_modules)."
            )
        if isinstance(base, (nn.Embedding, nn.MultiheadAttention)):
            raise BaraError(
                f"{type(lora_config).__name__} cannot adapt {current_key} ({type(base).__name__}): "
                "target linear and convolution layers only (exclude_modules leaves this one out)."
            )
        layer_reads = reads(self.model, current_key)
        if layer_reads is None:
            raise BaraError(
                f"{type(lora_config).__name__} cannot adapt {current_key}: an expert reads tokens "
                "of several inputs together, so that no draw can be told from another "
                "(exclude_modules leaves it out)."
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
        if not asks_variant(type(layer), "forward"):
            raise BaraError(
                f"{type(lora_config).__name__} cannot adapt {current_key}: {type(layer).__name__} "
                "computes plain LoRA, past the posterior. Leave it out (exclude_modules), or load "
                "the base model unquantised or with bitsandbytes."
            )
        if lora_config.granularity == "auto" and isinstance(base, CONVOLUTIONS):
            granularity = "sequence"  # a gate per image, not per pixel
        frozen = {adapter_name: lora_config.FROZEN}
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, **frozen}
        layer.lora_variant[adapter_name] = RankSpaceVariant(current_key, self.elbo, layer_reads)
        # plain LoRA on the same layer needs PEFT's cast; ours shares one among its siblings
        layer.cast_input_dtype_enabled = not all(
            isinstance(layer.lora_variant.get(name), RankSpaceVariant) for name in layer.lora_A
        )
        refuse_conversion(layer)
        self._new.append(_NewLayer(current_key, layer, granularity, torch.get_rng_state()))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT's hook: it takes the name off the last part only, and posteriors may be modules."""
        for container in (CONTAINER, HEAD_CONTAINER):
            key = key.replace(f".{container}.{adapter_name}.", f".{container}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's hook: also reads what earlier versions saved."""
        renamed = {renamed_key(key): tensor for key, tensor in state_dict.items()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)

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
        self.elbo.adapters.pop(adapter_name, None)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        """Refuses before the first layer is changed, not in the middle."""
        names = adapter_names or self.active_adapters
        require_untied(self.model, names)
        for module in self.model.modules():
            for name in names:
                if not isinstance(module, LoraLayer) or name not in module.lora_variant:
                    continue
                scale = posteriors(module)[name].mean_scale()
                if scale is not None and not asks_variant(type(module), "merge"):
                    raise BaraError(
                        f"{type(module).__name__} merges A and B without what scales the factors: "
                        "merge into a base model that is not quantised."
                    )

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
        restore_head(model)
        return model


def _calls_another(forward: Any, module: nn.Module) -> bool:
    """Whether a forward is a closure around that of another module of the same class."""
    cells = getattr(getattr(forward, "__func__", forward), "__closure__", None) or ()
    inner = [cell.cell_contents for cell in cells]
    return any(
        isinstance(function, MethodType)
        and function.__name__ == "forward"
        and type(function.__self__) is type(module)
        and function.__self__ is not module
        for function in inner
    )


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
    enter_into_enumeration(name)
    peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = family.config
    peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = BayesianLoraModel
    peft_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = BayesianLoraModel.prefix
    if family.head is None:  # PEFT swaps what layers hold, and nothing else
        keys = hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]
        hotswap.CONFIG_KEYS_TO_CHECK[name] = [*keys, *family.config.hotswap_keys()]


import_families()
for_each_family(enter_into_peft)
