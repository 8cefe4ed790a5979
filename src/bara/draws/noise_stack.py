"""Random numbers for all layers of an adapter at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bara.draws.draws import Draws
from bara.draws.processes import mixed


class NoiseStack(Protocol):
    """Random numbers for L layers in one forward pass, one row per input."""

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, (L, B, *shape), float32."""

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform numbers in [0, 1), (L, B, *shape), float32."""


class FreshNoiseStack:
    """Noise drawn anew for every input, as `FreshNoise` does.

    From a generator of its own, whose seed comes from torch's global one when the pass begins: the
    first adapted layer makes the stack, and what it draws there must not come between what a
    checkpointed block draws and draws again.
    """

    def __init__(
        self, num_layers: int, batch_size: int, device: torch.device, *entropy: int
    ) -> None:
        self.num_layers = num_layers
        self.batch_size = batch_size
        self.device = device
        self.generator = torch.Generator(device).manual_seed(mixed(*entropy))

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._normal(self.num_layers, self.batch_size, *shape)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.uniform_of(self.num_layers, shape)

    def uniform_of(self, num_layers: int, shape: tuple[int, ...]) -> Tensor:
        """Uniform numbers for so many of the layers, (layers, B, *shape)."""
        size = (num_layers, self.batch_size, *shape)
        return torch.rand(size, device=self.device, generator=self.generator)

    def sign_of(self, num_layers: int, shape: tuple[int, ...]) -> Tensor:
        """Random signs, -1.0 or 1.0, (layers, B, *shape)."""
        size = (num_layers, self.batch_size, *shape)
        bits = torch.randint(2, size, device=self.device, generator=self.generator)
        return (2 * bits - 1).float()

    def shared(self, num_layers: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers that all inputs share, (layers, *shape)."""
        return self._normal(num_layers, *shape)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device, generator=self.generator)


class FixedNoiseStack:
    """The rows of `Draws` that L layers need, as `FixedNoise` gives them to one."""

    def __init__(self, draws: Draws, rows: Tensor, layers: Sequence[str]) -> None:
        self.draws = draws
        self.rows = rows
        self.layers = layers

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._numbers(name, "normal", shape)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._numbers(name, "uniform", shape)

    def _numbers(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        stacked = self.draws.stacked(self.layers, name, kind, shape, self.rows.device)
        return stacked[:, self.rows]
