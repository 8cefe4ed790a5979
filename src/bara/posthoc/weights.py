"""Gaussian noise on a trained model's weights: the posterior of Laplace, TFB and IVON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bara.draws import Draws, DrawSource
from bara.errors import BaraError

NOISE_FILE = "weight_noise.safetensors"


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
    """Draws of some of a model's parameters, independent between parameters.

    A draw is one set of weights for all inputs. It depends on the seed, the parameters' names and
    its number alone, as those of `bara.draws.Draws` do.

    Args:
        model: the model whose weights are the mean.
        factors: covariance by parameter name.

    Raises:
        BaraError: the model has no parameter of such a name.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, Factors]) -> None:
        parameters = dict(model.named_parameters())
        if unknown := sorted(factors.keys() - parameters.keys()):
            raise BaraError(f"{NOISE_FILE} has noise for {unknown[0]}, which the model has not")
        self.factors = dict(factors)
        self.parameters = {name: parameters[name] for name in factors}

    @contextmanager
    def drawing(self, draws: Draws | None) -> Iterator[None]:
        """The model has the weights of draw 0 of `draws`, or with None its mean weights."""
        means = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            if draws is not None:
                for name, parameter in self.parameters.items():
                    mean = means[name]
                    normal = draws.numbers(name, "normal", tuple(mean.shape), mean.device)[0]
                    parameter.data = mean + self.factors[name].noise(normal).to(mean.dtype)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = means[name]

    def save(self, folder: Path) -> None:
        """Writes the factors to a file in the folder."""
        tensors = {
            f"{name}/{part.name}": value.contiguous()
            for name, factors in self.factors.items()
            for part in fields(factors)
            if (value := getattr(factors, part.name)) is not None
        }
        save_file(tensors, folder / NOISE_FILE)

    @classmethod
    def load(cls, model: nn.Module, folder: Path) -> WeightDraws:
        """Reads what `save` wrote.

        Raises:
            BaraError: the file is missing or damaged, or does not fit the model.
        """
        path = folder / NOISE_FILE
        parts: dict[str, dict[str, Tensor]] = {}
        try:
            for key, value in load_file(path).items():
                name, _, part = key.rpartition("/")
                parts.setdefault(name, {})[part] = value
            factors = {name: Factors(**values) for name, values in parts.items()}
        except (OSError, SafetensorError, TypeError) as error:
            raise BaraError(f"{path} is missing or damaged; train again or restore it") from error
        return cls(model, factors)
