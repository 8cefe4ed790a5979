"""Heads with a Gaussian posterior, in the place of PEFT's `modules_to_save`."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import linear

from bara.adapter.elbo import Elbo
from bara.draws.draws import Noise
from bara.errors import BaraError
from bara.posteriors.certified import CertifiedConfig
from bara.posteriors.posterior import Kl
from bara.posteriors.rank_space import wide


class GaussianLinear(nn.Module):
    """A linear layer whose weight and bias are N(mean, std^2), element by element.

    The prior's mean is the layer's start, so that a saved head is complete.
    """

    def __init__(self, layer: nn.Linear, config: CertifiedConfig) -> None:
        super().__init__()
        self.scale = config.logit_scale
        self.names = [name for name, _ in layer.named_parameters()]  # weight, and perhaps bias
        for name, value in layer.named_parameters():
            mean = wide(value.detach()).clone()
            log_std = torch.full_like(mean, math.log(config.head_prior_std))
            self.register_parameter(f"mean_{name}", nn.Parameter(mean))
            self.register_parameter(f"spread_{name}", nn.Parameter(torch.zeros_like(mean)))
            self.register_buffer(f"prior_mean_{name}", mean.clone())
            self.register_buffer(f"prior_log_std_{name}", log_std)

    def _part(self, kind: str, name: str) -> Tensor:
        return getattr(self, f"{kind}_{name}")

    def _mean(self, name: str) -> Tensor:
        return wide(self._part("mean", name))

    def _log_std(self, name: str) -> Tensor:
        return wide(self._part("prior_log_std", name)) + self.scale * wide(
            self._part("spread", name)
        )

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        """Applies a draw to each row of x, (B, ..., d_in), or the mean if `noise` is None."""
        with torch.autocast(x.device.type, enabled=False):
            means = {name: self._mean(name) for name in self.names}
            x = x.to(means["weight"].dtype)
            output = linear(x, means["weight"], means.get("bias"))
            if noise is None:
                return output
            draw = {
                name: noise.normal(name, tuple(mean.shape)) * self._log_std(name).exp()
                for name, mean in means.items()
            }
            rows = x.reshape(x.shape[0], -1, x.shape[-1])
            change = torch.einsum("bti,boi->bto", rows, draw["weight"])
            if "bias" in draw:
                change = change + draw["bias"].unsqueeze(1)
            return output + change.reshape(output.shape)

    def kl(self) -> Tensor:
        """KL(posterior || prior), a scalar in nats."""
        terms = []
        for name in self.names:
            posterior = Normal(self._mean(name), self._log_std(name).exp())
            prior_std = wide(self._part("prior_log_std", name)).exp()
            prior = Normal(wide(self._part("prior_mean", name)), prior_std)
            terms.append(kl_divergence(posterior, prior).sum())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def take_as_prior(self) -> None:
        """Makes the posterior the prior."""
        for name in self.names:
            self._part("prior_log_std", name).copy_(self._log_std(name))
            self._part("prior_mean", name).copy_(self._mean(name))
            self._part("spread", name).zero_()


class GaussianHead(nn.Module, BaseTunerLayer):
    """PEFT's view of a head: the base model's layer, and the posterior that replaces it."""

    adapter_layer_names = ("lora_head",)

    def __init__(
        self, layer: nn.Linear, name: str, adapter: str, config: CertifiedConfig, elbo: Elbo
    ) -> None:
        super().__init__()
        self.base_layer = layer
        self.name = name
        self.elbo = elbo
        self.lora_head = nn.ModuleDict({adapter: GaussianLinear(layer, config)})
        self.set_adapter(adapter, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = next((name for name in self.active_adapters if name in self.lora_head), None)
        if self.disable_adapters or adapter is None:
            return self.base_layer(x)
        head: Any = self.lora_head[adapter]
        forward = self.elbo.current()
        if forward is None:
            return head(x, None).to(x.dtype)
        if head.training and torch.is_grad_enabled() and head.mean_weight.requires_grad:
            forward.trainable = True
            forward.add(adapter, head, {"parameters": head.kl()}, Kl.of)
        noise = forward.noise(self.name, None, x.shape[0], x.device, head.training)
        return head(x, noise).to(x.dtype)


def in_heads(path: str, heads: list[str]) -> bool:
    """Whether the module at a path is one of the heads, or a part of one."""
    return any(f".{name}." in f".{path}." for name in heads)


def add_heads(model: nn.Module, adapter: str, config: CertifiedConfig, elbo: Elbo) -> None:
    """Gives every linear layer of the modules called `config.heads` a Gaussian posterior.

    Raises:
        BaraError: such a module has other parameters, or a posterior of another adapter.
    """
    for path, layer in list(model.named_modules()):
        if not in_heads(path, config.heads):
            continue
        if isinstance(layer, GaussianHead):
            raise BaraError(f"{path} has a certified adapter already; use a new base model.")
        if type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(
                model.get_submodule(parent), name, GaussianHead(layer, path, adapter, config, elbo)
            )
        elif list(layer.parameters(recurse=False)):
            raise BaraError(
                f"CertifiedConfig cannot train {path} ({type(layer).__name__}): linear layers "
                "only, so that everything that is fitted has a posterior."
            )
