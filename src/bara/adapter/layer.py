"""One LoRA layer with its posterior: forward pass and merging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from bara.adapter.elbo import Elbo
from bara.adapter.forward_pass import ForwardPass
from bara.errors import BaraError
from bara.posteriors.posterior import Posterior
from bara.posteriors.rank_space import RankSpace, wide

CONTAINER = "lora_posterior"
"""Name of the module dict that holds a layer's posteriors; PEFT saves what starts with lora_."""


class RankSpaceVariant(LoraVariant):
    """Connects one LoRA layer to its posterior: y = W0 x + s B posterior(A x)."""

    def __init__(self, layer: str, elbo: Elbo) -> None:
        self.layer = layer
        self.elbo = elbo

    def supports_lora_conversion(self) -> bool:
        return False

    def init(  # type: ignore[override]
        self, module: LoraLayer, adapter_name: str, posterior: Posterior
    ) -> None:
        """Adds the posterior's parameters to the layer."""
        if not hasattr(module, CONTAINER):
            module.adapter_layer_names = (*module.adapter_layer_names, CONTAINER)
            setattr(module, CONTAINER, nn.ModuleDict())
        posteriors(module)[adapter_name] = posterior
        a, b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        posterior.start(a, b)

    def forward(  # type: ignore[override]
        self,
        module: LoraLayer,
        active_adapter: str,
        x: Tensor,
        result: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """PEFT's hook: the layer's output with the adapter's contribution."""
        posterior = posteriors(module)[active_adapter]
        forward = self._forward_pass(posterior, x)
        trainable = any(
            parameter.requires_grad
            for part in (module.lora_A[active_adapter], module.lora_B[active_adapter], posterior)
            for parameter in part.parameters()
        )
        if trainable and torch.is_grad_enabled():
            forward.trainable = True
        trainable = trainable and posterior.training
        with_kl = trainable and torch.is_grad_enabled()
        if with_kl:
            self.elbo.require_observations(active_adapter)
        elif trainable and forward.training:
            raise BaraError(
                "Reentrant gradient checkpointing would drop the KL of the recomputed layers. Use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )

        x = module.lora_dropout[active_adapter](x)
        space, restore = self._rank_space(module, active_adapter, x, forward)
        rows = forward.rows_of(active_adapter, x.device)
        noise = forward.noise(
            self._noise_key(module, active_adapter),
            rows,
            space.u.shape[0],
            x.device,
            posterior.training,
        )
        output = posterior(space, noise, with_kl=with_kl)
        if with_kl:
            forward.add(active_adapter, posterior, output.kl, posterior.kl)
        if self.elbo.observers:
            with torch.autocast(x.device.type, enabled=False):
                for observe in self.elbo.observers:
                    observe(self.layer, posterior, space)
        lora_b, scaling = module.lora_B[active_adapter], module.scaling[active_adapter]
        if lora_b.bias is None:
            update = lora_b(restore(output.u * scaling))  # in rank space it costs least
        else:
            update = lora_b(restore(output.u)) * scaling
        if output.from_b is not None:
            update = update + restore(output.from_b).to(update.dtype) * scaling
        return result + update

    def _noise_key(self, module: LoraLayer, adapter: str) -> str:
        """Adapters that are active together draw independently; a lone one whatever its name."""
        active = module.active_adapters
        position = active.index(adapter) if adapter in active else 0
        return f"{self.layer}#{position}" if position else self.layer

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
        self, module: LoraLayer, adapter: str, x: Tensor, forward: ForwardPass
    ) -> tuple[RankSpace, Any]:
        """The layer's rank space as (rows, positions, r), and the way back to its own layout."""
        lora_a: Any = module.lora_A[adapter]
        lora_b: Any = module.lora_B[adapter]
        convolution = not isinstance(lora_a, nn.Linear)
        rows = forward.rows_of(adapter, x.device)
        batch = forward.batch_size if rows is None else len(rows)

        def flatten(u: Tensor) -> Tensor:
            if convolution:
                return u.flatten(2).transpose(1, 2)
            # windows or flattened tokens of one input follow each other
            size = batch if batch and u.shape[0] % batch == 0 else u.shape[0]
            return u.reshape(size, -1, u.shape[-1])

        dtype, cast = autocast_dtype(x), x
        if dtype != x.dtype:  # autocast would do it in every layer again
            cast = forward.of_input(x, self.layer, f"{dtype}", lambda x: x.to(dtype))
        u = lora_a(cast)
        layout = u.shape

        def restore(flat: Tensor) -> Tensor:
            if convolution:
                return flat.transpose(1, 2).reshape(layout)
            return flat.reshape(*layout[:-1], flat.shape[-1])

        flat = flatten(u)
        given = x
        if not convolution:
            x = x.reshape(*flat.shape[:2], x.shape[-1])

        def half_squared_input(dtype: torch.dtype) -> Tensor:
            source = cast if cast.dtype == dtype else given.to(dtype)
            square = forward.of_input(
                given, self.layer, f"square {dtype}", lambda _: source * source.detach()
            )
            return square.reshape(x.shape)

        def project(x: Tensor, weight: Tensor) -> Tensor:
            if not convolution:
                return x @ weight.mT
            if weight.dim() == lora_a.weight.dim():
                return flatten(lora_a._conv_forward(x, weight, None))

            def one(image: Tensor, weight: Tensor) -> Tensor:
                return lora_a._conv_forward(image.unsqueeze(0), weight, None).squeeze(0)

            return flatten(torch.vmap(one)(x, weight))

        weights = None if convolution else forward.position_weights(flat.shape[1], rows)
        if weights is None and not convolution and flat.shape[1] > 1:
            self._check_unmasked(posteriors(module)[adapter], forward, flat.shape[1])
        groups = getattr(lora_b, "groups", 1)
        a, b = lora_a.weight, lora_b.weight
        space = RankSpace(flat, wide(flat), x, a, b, weights, project, half_squared_input, groups)
        return space, restore

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


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The precision in which a linear layer would see x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


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
