"""Gaussian noise on a trained model's weights: the posterior of Laplace, TFB, IVON and a probe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from bara.adapter.call_inputs import batch_size_of
from bara.adapter.inspection import passed_by
from bara.draws.blocks import Blocks
from bara.draws.draws import Draws, DrawSource
from bara.draws.sharing import lock_of
from bara.errors import BaraError
from bara.prediction.outputs import base_of

NOISE_FILE = "weight_noise.safetensors"
LINEARISED, SHARED = "linearised", "shared"


@dataclass(frozen=True)
class Factors:
    """The covariance of one parameter W, seen as a matrix (rows, columns): a draw is

        W + left (scale * E) right^T,    E standard normal.

    Attributes:
        scale: standard deviations, broadcastable to (rows, columns); to (rows,) for a vector.
        left: (rows, rows) or None for the identity.
        right: (columns, columns) or None for the identity.
    """

    scale: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def noise(self, standard_normal: Tensor) -> Tensor:
        """The noise that standard normal numbers in the parameter's shape become."""
        shape = standard_normal.shape
        flat = standard_normal.flatten(1) if len(shape) > 1 else standard_normal
        noise = self.scale.to(flat) * flat
        if self.left is not None:
            noise = self.left.to(flat) @ noise
        if self.right is not None:
            noise = noise @ self.right.to(flat).T
        return noise.reshape(shape)


class WeightDraws(DrawSource):
    """Draws of some of a model's parameters, independent between the entries of `factors`.

    A draw is one set of weights for all inputs. It depends on the seed, the entries' names and
    its number alone, as those of `bara.draws.draws.Draws` do. Where all entries are single weights
    and biases of linear layers, several draws fit into one batch: every layer adds to each block
    of rows what the noise of its draw makes of them.

    Args:
        model: the model whose weights are the mean.
        factors: covariance by the name of a parameter, or of a linear layer: of its weight and
            bias, then, as one matrix (outputs, inputs + 1).
        linearised: predict with the model's first-order expansion around the mean weights, as a
            Laplace approximation does: logits(W) + J (draw - W). Exact forward-mode
            differentiation, at about three times the cost of a forward pass. Draws then come in
            pairs, W + noise and W - noise (antithetic sampling): logits average to those of the
            mean, which a few draws of a wide Gaussian do not.
        shared: the one entry is the linear layer whose outputs are the model's logits, called once
            with a row for each input: all draws share the pass up to it.

    Raises:
        BaraError: the model has no parameter or linear layer of such a name.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Mapping[str, Factors],
        linearised: bool = False,
        shared: bool = False,
    ) -> None:
        parameters = dict(model.named_parameters())
        modules = dict(model.named_modules())
        self.layers = {
            name: layer for name in factors if isinstance(layer := modules.get(name), nn.Linear)
        }
        if unknown := sorted(factors.keys() - parameters.keys() - self.layers.keys()):
            raise BaraError(f"{NOISE_FILE} has noise for {unknown[0]}, which the model has not")
        self.model = model
        self.linearised = linearised
        self.shared = shared
        self.factors = dict(factors)
        names = [part for name in factors for part in self._parts(name)]
        self.parameters = {name: parameters[name] for name in names}
        owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        linear = all(type(owner) is nn.Linear for owner in owners)
        self.batched = not linearised and not self.layers and linear

    def _parts(self, name: str) -> list[str]:
        """The parameters that an entry is about."""
        return [f"{name}.weight", f"{name}.bias"] if name in self.layers else [name]

    def in_force(self) -> bool:
        modules = self.model.named_modules()
        passed = [f"{name}." for name, module in modules if passed_by(module)]
        return any(
            not any(n.startswith(p) and not n.startswith(f"{p}base_layer.") for p in passed)
            for n in self.parameters
        )

    @contextmanager
    def drawing(self, draws: Draws | None) -> Iterator[None]:
        """The model has the weights of `draws`, or with None its mean weights."""
        with lock_of(self.model):
            if draws is None:
                yield
            elif self.linearised:
                with self._expanded(self._noise(draws)):
                    yield
            elif self.shared:
                with self._fanned_out(draws):
                    yield
            elif draws.num_draws > 1:
                with self._together(draws):
                    yield
            else:
                with self._moved(self._noise(draws)):
                    yield

    @contextmanager
    def _expanded(self, noise: dict[str, Tensor]) -> Iterator[None]:
        """Adds to the logits what the noise changes in them to first order."""

        def expand(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            output["logits"] = output["logits"] + self._change(noise, args, kwargs, handle)
            return output

        handle = self.model.register_forward_hook(expand, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _fanned_out(self, draws: Draws) -> Iterator[None]:
        """The logits (n, C) of the mean weights become those of every draw, (S n, C)."""
        ((name, layer),) = self.layers.items()
        joint = (layer.out_features, layer.in_features + 1)
        noise = self._drawn(name, draws, joint, layer.weight.device)  # (S, C, d + 1)
        features: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            features.append(args[0])

        def fan_out(_: nn.Module, args: Any, output: Any) -> Any:
            x = features.pop().to(noise.dtype)
            change = x @ noise[..., :-1].mT + noise[..., -1].unsqueeze(1)  # (S, n, C)
            output["logits"] = (output["logits"] + change).flatten(0, 1)
            return output

        handles = [layer.register_forward_pre_hook(keep), self.model.register_forward_hook(fan_out)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _moved(self, noise: dict[str, Tensor]) -> Iterator[None]:
        """Adds the noise to the weights."""
        means = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, change in noise.items():
                self.parameters[name].data = means[name] + change
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = means[name]

    @contextmanager
    def _together(self, draws: Draws) -> Iterator[None]:
        """Every linear layer adds to each block of rows the noise of its draw."""
        root = base_of(self.model)
        blocks, rows = Blocks(draws.num_draws), [0]
        layers: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            noise = self._drawn(name, draws, tuple(parameter.shape), parameter.device)
            layer, _, part = name.rpartition(".")
            layers.setdefault(layer, {})[part] = noise.to(parameter.dtype)

        def count(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            positional = {str(index): value for index, value in enumerate(args)}
            rows[0] = batch_size_of(positional | kwargs)
            blocks.draw_of_rows(rows[0], torch.device("cpu"))  # refuses what is no whole blocks

        def add(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            x = args[0]
            if x.shape[0] != rows[0]:
                raise BaraError(
                    f"{name} sees tokens of several rows together, so that draws cannot share a "
                    "batch: predict with batch_size=1, which takes one draw at a time."
                )
            noise = layers[name]
            change = torch.zeros_like(output)
            if (weight := noise.get("weight")) is not None:
                by_draw = blocks.split(x)
                product = by_draw.flatten(1, -2).to(weight) @ weight.mT
                change = product.reshape(*output.shape).to(output.dtype)
            if (bias := noise.get("bias")) is not None:
                shape = (blocks.num_draws, *[1] * (output.dim() - 1), output.shape[-1])
                change = (blocks.split(change) + bias.view(shape)).flatten(0, 1)
            return output + change

        # generation calls the root itself, and PEFT's own forward may pass its hooks by
        outermost = {self.model, root}
        handles = [m.register_forward_pre_hook(count, with_kwargs=True) for m in outermost]
        for name in layers:
            hook = partial(add, name)
            handles.append(self.model.get_submodule(name).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _noise(self, draws: Draws) -> dict[str, Tensor]:
        """What draw 0 of `draws` adds to the mean weights."""
        sign = 1.0
        if self.linearised:
            pair, second = divmod(draws.first, 2)
            draws, sign = Draws(1, draws.seed, pair), -1.0 if second else 1.0
        noise: dict[str, Tensor] = {}
        for name in self.factors:
            parts = [self.parameters[part] for part in self._parts(name)]
            shape = parts[0].shape
            if len(parts) > 1:
                shape = torch.Size((shape[0], shape[1] + 1))
            (drawn,) = self._drawn(name, draws, tuple(shape), parts[0].device)
            change = sign * drawn.to(parts[0].dtype)
            changes = [change] if len(parts) == 1 else [change[:, :-1], change[:, -1]]
            noise.update(zip(self._parts(name), changes, strict=True))
        return noise

    def _drawn(
        self, name: str, draws: Draws, shape: tuple[int, ...], device: torch.device
    ) -> Tensor:
        """The noise of every draw on an entry of this shape, (S, *shape)."""
        normal = draws.numbers(name, "normal", shape, device)
        return torch.stack([self.factors[name].noise(one) for one in normal])

    def _change(
        self, noise: dict[str, Tensor], args: Any, kwargs: dict[str, Any], handle: Any
    ) -> Tensor:
        """J noise, the change of the logits to first order."""

        def logits(weights: dict[str, Tensor]) -> Tensor:
            return functional_call(self.model, weights, args, kwargs)["logits"]

        means = {name: parameter.detach() for name, parameter in self.parameters.items()}
        hooks = self.model._forward_hooks
        hook = hooks.pop(handle.id)  # it is what is running
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
                return jvp(logits, (means,), (noise,))[1]
        finally:
            hooks[handle.id] = hook

    def save(self, folder: Path) -> None:
        """Writes the factors to a file in the folder."""
        tensors = {
            f"{name}/{part.name}": value.contiguous()
            for name, factors in self.factors.items()
            for part in fields(factors)
            if (value := getattr(factors, part.name)) is not None
        }
        metadata = {LINEARISED: str(self.linearised), SHARED: str(self.shared)}
        save_file(tensors, folder / NOISE_FILE, metadata)

    @classmethod
    def load(cls, model: nn.Module, folder: Path) -> WeightDraws:
        """Reads what `save` wrote.

        Raises:
            BaraError: the file is missing or damaged, or does not fit the model.
        """
        path = folder / NOISE_FILE
        parts: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                linearised, shared = metadata[LINEARISED] == "True", metadata.get(SHARED) == "True"
                for key in file.keys():  # noqa: SIM118  (no dictionary)
                    name, _, part = key.rpartition("/")
                    parts.setdefault(name, {})[part] = file.get_tensor(key)
            factors = {name: Factors(**values) for name, values in parts.items()}
        except (OSError, SafetensorError, TypeError, KeyError) as error:
            raise BaraError(f"{path} is missing or damaged; train again or restore it") from error
        return cls(model, factors, linearised, shared)
