"""One LoRA layer with its posterior: forward pass and merging."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from bara.adapter.elbo import Elbo
from bara.adapter.forward_pass import ForwardPass
from bara.adapter.fused_pass import drops_out, fused_layer
from bara.adapter.layout import Layout, Reads
from bara.adapter.peft_020 import read_saved_names
from bara.draws.draws import Noise
from bara.errors import BaraError
from bara.posteriors.config import BayesianConfig
from bara.posteriors.fused import FusedLayer
from bara.posteriors.posterior import LayerSetup, Posterior, PosteriorOutput
from bara.posteriors.rank_space import Projection, RankSpace, SharedInput, wide

CONTAINER = "lora_posterior"
"""Name of the module dict that holds a layer's posteriors; PEFT saves what starts with lora_."""


class RankSpaceVariant(LoraVariant):
    """Connects one LoRA layer to its posterior: y = W0 x + s B posterior(A x)."""

    def __init__(self, layer: str, elbo: Elbo, reads: Reads) -> None:
        self.layer = layer
        self.elbo = elbo
        self.reads = reads

    def supports_lora_conversion(self) -> bool:
        return False

    def init(  # type: ignore[override]
        self, module: LoraLayer, adapter_name: str, **kwargs: Any
    ) -> None:
        """PEFT's hook, for a layer whose A and B are made anew: EVA gives it another rank.

        Raises:
            BaraError: it is plain LoRA that makes them, as a second adapter of this name.
        """
        if not isinstance(kwargs.get("config"), BayesianConfig):
            raise BaraError(already_there(adapter_name))
        attached, old = self.elbo.adapters[adapter_name], posteriors(module)[adapter_name]
        a, b = (getattr(module, part)[adapter_name].weight for part in ("lora_A", "lora_B"))
        setup = LayerSetup(attached.config, attached.resolved, a, b, old.granularity)
        add_posterior(module, adapter_name, type(old)(setup).train(old.training))
        attached.layers[self.layer] = module, posteriors(module)[adapter_name]

    def forward(  # type: ignore[override]
        self,
        module: LoraLayer,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """PEFT's hook: the layer's output with the adapter's contribution."""
        if self.reads == "time first" and x.dim() == 3:
            x, result = x.transpose(0, 1), result.transpose(0, 1)
            return self._forward(module, active_adapter, x, result).transpose(0, 1).contiguous()
        return self._forward(module, active_adapter, x, result)

    def _forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """`forward` with the inputs of the batch in the first dimension."""
        posterior = posteriors(module)[active_adapter]
        forward = self._forward_pass(posterior, x)
        if x.dim() == 3 and self._is_shared_by_all(x, forward):
            return result + self._shared_by_all(module, active_adapter, x, forward)
        with_kl = self._asks_for_kl(module, active_adapter, posterior, forward)
        if with_kl:
            posterior.calibrated = None  # what it was averaged over is about to change
        shared = self._input(module, active_adapter, x, forward)
        fused = self._fused(module, active_adapter, posterior, shared.x, forward)
        if fused is not None:
            positions = shared.x.numel() // (forward.batch_size * shared.x.shape[-1])
            weights = self._position_weights(posterior, forward, positions, None)
            result, kl = fused(shared, forward.batch_size, weights, result)
            if with_kl:
                forward.add(active_adapter, posterior, kl, posterior.kl)
            return result
        space, layout = self._rank_space(module, active_adapter, shared, forward)
        noise = self._noise(module, active_adapter, posterior, space, forward)
        with torch.autocast(space.u.device.type, enabled=False):
            output = posterior(space, noise, with_kl=with_kl)
            for observe in forward.observers:
                observe(self.layer, posterior, space)
        if with_kl:
            forward.add(active_adapter, posterior, output.kl, posterior.kl)
        return result + self._through_b(module, active_adapter, output, layout)

    def _is_shared_by_all(self, x: Tensor, forward: ForwardPass) -> bool:
        """Whether x is one row for all inputs of the batch, such as relative positions."""
        if x.shape[0] != 1 or forward.adapter_names is not None:  # PEFT shares rows out
            return False
        lengths = [weights.shape[1] for weights in forward.weights]
        positions = bool(lengths) and x.shape[1] not in lengths
        return forward.batch_size > 1 or (self.reads == "positions too" and positions)

    def _shared_by_all(
        self, module: LoraLayer, adapter: str, x: Tensor, forward: ForwardPass
    ) -> Tensor:
        """The mean's contribution, (1, T, d_out): no draw of a single input can be in it."""
        shared = self._input(module, adapter, x, forward)
        space, layout = self._rank_space(module, adapter, shared, replace(forward, weights=()))
        with torch.autocast(space.u.device.type, enabled=False):
            output = posteriors(module)[adapter](space, None, with_kl=False)
        return self._through_b(module, adapter, output, layout)

    def _input(
        self, module: LoraLayer, adapter: str, x: Tensor, forward: ForwardPass
    ) -> SharedInput:
        """What A reads, after LoRA's dropout."""
        shared = forward.input_of(x, self.layer)
        if not drops_out(module, adapter):
            return shared
        weight: Any = module.lora_A[adapter].weight
        dropout: Any = module.lora_dropout[adapter]
        return SharedInput(dropout(shared.cast(weight.dtype)))

    def _fused(
        self,
        module: LoraLayer,
        adapter: str,
        posterior: Posterior,
        x: Tensor,
        forward: ForwardPass,
    ) -> FusedLayer | None:
        """The layer prepared together with the adapter's others; None if it goes on its own."""
        if x.dim() < 2 or x.shape[0] % forward.batch_size or not x.numel():
            return None
        lora_a: Any = module.lora_A[adapter]
        if forward.draws is None and not self._draws_anew(adapter, posterior):
            return None
        layers = self.elbo.adapters[adapter].layers
        return fused_layer(self.layer, adapter, layers, forward, projection_dtype(x, lora_a.weight))

    def _asks_for_kl(
        self, module: LoraLayer, adapter: str, posterior: Posterior, forward: ForwardPass
    ) -> bool:
        """Whether this use of the layer trains, and so pays its KL."""
        a, b = (getattr(module, part)[adapter].weight for part in ("lora_A", "lora_B"))
        # a look at A's weight is enough in nearly every layer, and walking modules takes time
        trainable = (
            a.requires_grad
            or b.requires_grad
            or any(parameter.requires_grad for parameter in posterior.parameters())
        )
        if trainable and torch.is_grad_enabled():
            forward.trainable = True
        trainable = trainable and posterior.training
        if trainable and torch.is_grad_enabled():
            self.elbo.require_observations(adapter)
            return True
        if trainable and forward.training:
            raise BaraError(
                "Reentrant gradient checkpointing would drop the KL of the recomputed layers. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        return False

    def _noise(
        self,
        module: LoraLayer,
        adapter: str,
        posterior: Posterior,
        space: RankSpace,
        forward: ForwardPass,
    ) -> Noise | None:
        """The layer's random numbers; None for the posterior mean."""
        device, key = space.u.device, self.noise_key(module, adapter)
        rows = forward.rows_of(adapter, device)
        anew = self._draws_anew(adapter, posterior)
        return forward.noise(key, rows, space.u.shape[0], device, anew)

    def _draws_anew(self, adapter: str, posterior: Posterior) -> bool:
        """Whether there is noise without `bara.sampling`: in training mode, but for a reference."""
        compared = self.elbo.adapters[adapter].reference and not torch.is_grad_enabled()
        return posterior.training and not compared

    def noise_key(self, module: LoraLayer, adapter: str) -> str:
        """Adapters that are active together draw independently; a lone one whatever its name."""
        active = module.active_adapters
        position = active.index(adapter) if adapter in active else 0
        return f"{self.layer}#{position}" if position else self.layer

    def _through_b(
        self, module: LoraLayer, adapter: str, output: PosteriorOutput, layout: Layout
    ) -> Tensor:
        """s B u, with what the noise of B adds."""
        lora_b, scaling = module.lora_B[adapter], module.scaling[adapter]
        if lora_b.bias is None:
            update = lora_b(layout.restore(output.u * scaling))  # in rank space it costs least
        else:
            update = lora_b(layout.restore(output.u)) * scaling
        if output.from_b is not None:
            update = update + layout.restore(output.from_b).to(update.dtype) * scaling
        return update

    def _forward_pass(self, posterior: Posterior, x: Tensor) -> ForwardPass:
        forward = self.elbo.current()
        if forward is not None:
            return forward
        if posterior.training and torch.is_grad_enabled():
            raise BaraError(
                f"Layer {self.layer} was trained outside of the adapted model's own forward pass, "
                "so that its KL would be lost. Call the PEFT model itself."
            )
        if posterior.granularity == "sequence" and x.dim() == 3 and x.shape[1] > 1:
            raise BaraError(
                f"Layer {self.layer} was called outside of the adapted model's own forward pass, "
                "where padding cannot be told from text. Call the PEFT model itself, or use "
                "granularity='token'."
            )
        return ForwardPass(batch_size=x.shape[0], draws=self.elbo.draws)

    def _rank_space(
        self, module: LoraLayer, adapter: str, shared: SharedInput, forward: ForwardPass
    ) -> tuple[RankSpace, Layout]:
        """The layer's rank space, and how the layer itself arranges it."""
        lora_a: Any = module.lora_A[adapter]
        lora_b: Any = module.lora_B[adapter]
        convolution = not isinstance(lora_a, nn.Linear)
        x = shared.cast(lora_a.weight.dtype)  # where PEFT casts it in every layer
        rows = forward.rows_of(adapter, x.device)
        arranged = lora_a(shared.cast(projection_dtype(x, lora_a.weight)))
        batch = forward.batch_size if rows is None else len(rows)
        layout = Layout(arranged.shape, convolution, batch)
        u = layout.flatten(arranged)
        weights = None
        if not convolution:
            x = x.reshape(*u.shape[:2], x.shape[-1])
            posterior = posteriors(module)[adapter]
            weights = self._position_weights(posterior, forward, u.shape[1], rows)
        space = RankSpace(
            u=u,
            wide_u=wide(u),
            input=shared,
            x=x,
            a=lora_a.weight,
            b=lora_b.weight,
            weights=weights,
            project=_projection(lora_a),
            groups=getattr(lora_b, "groups", 1),
        )
        return space, layout

    def _position_weights(
        self, posterior: Posterior, forward: ForwardPass, positions: int, rows: Tensor | None
    ) -> Tensor | None:
        """What the positions count; None for all alike.

        Raises:
            BaraError: they are to be pooled, and no mask says which of them are padding.
        """
        weights = forward.position_weights(positions, rows)
        if weights is None and positions > 1:
            self._check_unmasked(posterior, forward, positions)
        return weights

    def _check_unmasked(self, posterior: Posterior, forward: ForwardPass, positions: int) -> None:
        if posterior.granularity == "sequence" and any(not w.all() for w in forward.weights):
            raise BaraError(
                f"Layer {self.layer} has {positions} positions per input, which no padding mask "
                "given to the model matches: a gate pooled over them would read padding. Use "
                "granularity='token'."
            )

    # -- merging: the posterior mean, where it is a matrix -------------------------------------

    def merge_safe(  # type: ignore[override]
        self, module: LoraLayer, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        return orig_weight + self._mean_delta(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(  # type: ignore[override]
        self, module: LoraLayer, active_adapter: str, orig_weight: Tensor
    ) -> None:
        orig_weight.data += self._mean_delta(module, active_adapter).to(orig_weight.dtype)

    def unmerge(  # type: ignore[override]
        self, module: LoraLayer, active_adapter: str, orig_weight: Tensor
    ) -> Tensor:
        return orig_weight - self._mean_delta(module, active_adapter).to(orig_weight.dtype)

    def _mean_delta(self, module: Any, adapter: str) -> Tensor:
        scale = posteriors(module)[adapter].mean_scale()
        with torch.no_grad(), _with_scaled_columns(module.lora_B[adapter], scale):
            return module.get_delta_weight(adapter)


LINEAR = Projection()


def _projection(lora_a: Any) -> Projection:
    if isinstance(lora_a, nn.Linear):
        return LINEAR
    return Projection(lora_a.stride, lora_a.padding, lora_a.dilation, lora_a.groups)


def projection_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The precision in which a linear layer of this weight would see x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


@contextmanager
def _with_scaled_columns(lora_b: Any, scale: Tensor | None) -> Iterator[None]:
    """B with its columns multiplied by `scale`, (r,), for as long as the context lasts."""
    original = lora_b.weight.data
    lora_b.weight.data = scaled_columns(lora_b, scale)
    try:
        yield
    finally:
        lora_b.weight.data = original


def scaled_columns(lora_b: Any, scale: Tensor | None) -> Tensor:
    """The weight of B with its columns multiplied by `scale`, (r,); None multiplies by ones."""
    weight: Tensor = lora_b.weight.data
    if scale is None:
        return weight
    groups = getattr(lora_b, "groups", 1)
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    shape = (groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
    return (grouped * scale.to(weight).reshape(shape)).reshape(weight.shape)


def already_there(adapter: str) -> str:
    """What to do about a second adapter of one name."""
    return (
        f"The model has a Bayesian adapter {adapter!r} already: call unload() on the PEFT model, "
        "or load the base model again, before giving it to get_peft_model once more."
    )


def asks_variant(layer: type[LoraLayer], method: str) -> bool:
    """Whether a method of a class of PEFT's layers asks the layer's variant: those of some
    quantised and parallel layers compute plain LoRA, whatever the variant."""
    for kind in layer.__mro__:
        if method in vars(kind):
            code = getattr(inspect.unwrap(vars(kind)[method]), "__code__", None)
            names = code.co_names if code else ()
            if "lora_variant" in names or "super" not in names:
                return "lora_variant" in names
    return False


def add_posterior(module: LoraLayer, adapter: str, posterior: Posterior) -> None:
    """Adds a posterior's parameters to a layer, on the layer's device."""
    if not hasattr(module, CONTAINER):
        module.adapter_layer_names = (*module.adapter_layer_names, CONTAINER)
        setattr(module, CONTAINER, nn.ModuleDict())
        read_saved_names(posteriors(module), renamed_key)
    posteriors(module)[adapter] = posterior
    module._move_adapter_to_device_of_base_layer(adapter)


OLD_NAMES = {"network.0": "hidden", "network.2": "output"}
"""Parts of BaLoRA's posterior by their names in version 0.1."""


def renamed_key(key: str) -> str:
    """A saved tensor's name today.

    Version 0.1 left the adapter's name in front of what lies deeper in a posterior than PEFT looks.
    """
    key = re.sub(rf"(\.{CONTAINER})\.[^.]+(\.network\.)", r"\1\2", key)
    for old, new in OLD_NAMES.items():
        key = key.replace(f".{CONTAINER}.{old}.", f".{CONTAINER}.{new}_")
    return key


def adapted_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any, Posterior]]:
    """An adapter's layers: name in the base model, PEFT's layer, posterior."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            variant = module.lora_variant.get(adapter)
            if isinstance(variant, RankSpaceVariant):
                yield variant.layer, module, posteriors(module)[adapter]


def posteriors(module: Any) -> Any:
    """The module dict of a layer's posteriors by adapter name."""
    return getattr(module, CONTAINER)
