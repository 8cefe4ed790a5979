"""Where a posterior's random numbers come from: fixed seeded draws, or fresh noise in training."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from bara.draws.blocks import Blocks
from bara.draws.processes import mixed, own_generator
from bara.errors import BaraError


class Noise(Protocol):
    """Random numbers for one layer in one forward pass, one row per input."""

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, (B, *shape), float32."""

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape), float32."""


class FreshNoise:
    """Noise drawn anew for every input from torch's global generator: what training uses.

    The global generator is what `torch.utils.checkpoint` replays and what `Trainer` saves, so that
    recomputed and resumed steps see the same numbers. Where several processes train together it
    seeds a generator of each process's own.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self.device = device
        self.generator = own_generator(device)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.shared((self.batch_size, *shape))

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        size = (self.batch_size, *shape)
        return torch.rand(size, device=self.device, generator=self.generator)

    def sign(self, shape: tuple[int, ...]) -> Tensor:
        """Random signs, -1.0 or 1.0, (B, *shape)."""
        size = (self.batch_size, *shape)
        bits = torch.randint(2, size, device=self.device, generator=self.generator)
        return (2 * bits - 1).float()

    def shared(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers that all inputs share, in that shape."""
        return torch.randn(shape, device=self.device, generator=self.generator)


class Draws:
    """S fixed draws of the posterior, each one consistent model for every input and token.

    Draw d of a layer depends on the seed, the layer's name and d alone: not on the device, the
    batch, the number of draws or what was drawn before.
    """

    def __init__(self, num_draws: int = 1, seed: int | None = None, first: int = 0) -> None:
        self.num_draws = check_draws(num_draws)
        self.first = first
        self.seed = int(torch.randint(2**31, ()).item()) if seed is None else int(seed)
        self._cache: dict[tuple[str, tuple[int, ...], torch.device], Tensor] = {}

    def rows(self, batch_size: int, device: torch.device) -> Tensor:
        """Which draw each row of the batch belongs to, (B,): the batch is S blocks, draw by draw.

        Raises:
            BaraError: the batch size is not a multiple of S.
        """
        return Blocks(self.num_draws).draw_of_rows(batch_size, device)

    @torch.compiler.disable  # what is drawn once needs no graph
    def numbers(self, key: str, kind: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The random numbers called `key` of all draws, (S, *shape), float32."""
        cached = self._cache.get((key, shape, device))
        if cached is None:
            sample = torch.randn if kind == "normal" else torch.rand
            name = zlib.crc32(key.encode())
            cached = torch.stack(
                [
                    sample(shape, generator=generator(self.seed, name, draw))
                    for draw in range(self.first, self.first + self.num_draws)
                ]
            ).to(device)
            self._cache[key, shape, device] = cached
        return cached

    def stacked(
        self,
        layers: Sequence[str],
        name: str,
        kind: str,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> Tensor:
        """The numbers called `name` of several layers, (L, S, *shape), float32."""
        key = (" ".join((name, *layers)), shape, device)
        if key not in self._cache:
            numbers = [self.numbers(f"{layer}/{name}", kind, shape, device) for layer in layers]
            self._cache[key] = torch.stack(numbers)
        return self._cache[key]


def check_draws(num_draws: int, least: int = 1) -> int:
    """The number of draws as a Python integer.

    Raises:
        BaraError: it is no integer (1e3 is a float), or below `least`.
    """
    try:
        number = operator.index(num_draws)
    except TypeError:
        raise BaraError(f"num_draws must be a whole number, got {num_draws!r}.") from None
    if number < least:
        raise BaraError(f"num_draws must be at least {least}, got {number}.")
    return number


class DrawSource:
    """What makes a model's forward passes use draws of its posterior.

    Attributes:
        batched: several draws fit into one batch, block by block; else there is one at a time.
        shared: all draws that there are come from one forward pass of the inputs: what is random
            is what the model ends with.
    """

    batched = False
    shared = False

    def num_draws(self, wanted: int) -> int:
        """How many draws there are when `wanted` are asked for."""
        return wanted

    def in_force(self) -> bool:
        """Whether forward passes read what is drawn, or the adapter is merged or disabled."""
        return True

    @contextmanager
    def drawing(self, draws: Draws | None) -> Iterator[None]:
        """Forward passes inside use these draws, or with None the posterior mean."""
        raise NotImplementedError
        yield


def attach_draws(model: nn.Module, source: DrawSource) -> None:
    """Makes `bara.predict` and `bara.sampling` draw from this source."""
    model.__dict__["bara_draws"] = source  # no submodule: it refers to the model's parameters


def draw_source(model: nn.Module) -> DrawSource | None:
    """Where a model's draws come from, however it is wrapped; None if it has a single mode."""
    for module in model.modules():
        for name in ("bara_draws", "bara_elbo"):
            source = module.__dict__.get(name)
            if isinstance(source, DrawSource):
                return source
    return None


def source_in_force(model: nn.Module) -> DrawSource | None:
    """Where a model's draws come from; None too where its adapter is merged or disabled, so that
    it has a single mode now."""
    source = draw_source(model)
    return source if source is not None and source.in_force() else None


def generator(*entropy: int) -> torch.Generator:
    """A generator on the CPU whose state mixes all the given numbers."""
    return torch.Generator().manual_seed(mixed(*entropy))


class FixedNoise:
    """The rows of `Draws` that one layer's (sub-)batch needs."""

    def __init__(self, draws: Draws, rows: Tensor, layer: str) -> None:
        self.draws = draws
        self.rows = rows
        self.layer = layer

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._numbers(name, "normal", shape)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._numbers(name, "uniform", shape)

    def _numbers(self, name: str, kind: str, shape: tuple[int, ...]) -> Tensor:
        key = f"{self.layer}/{name}"
        return self.draws.numbers(key, kind, shape, self.rows.device)[self.rows]
