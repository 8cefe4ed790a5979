"""Where a posterior's random numbers come from: fixed seeded draws, or fresh noise in training."""

from __future__ import annotations

import zlib
from typing import Protocol

import torch
from torch import Tensor

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
    recomputed and resumed steps see the same numbers.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self.device = device

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(self.batch_size, *shape, device=self.device)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(self.batch_size, *shape, device=self.device)


class Draws:
    """S fixed draws of the posterior, each one consistent model for every input and token.

    Draw d of a layer depends on the seed, the layer's name and d alone: not on the device, the
    batch, the number of draws or what was drawn before.
    """

    def __init__(self, num_draws: int = 1, seed: int | None = None, first: int = 0) -> None:
        if num_draws < 1:
            raise BaraError(f"num_draws must be at least 1, got {num_draws}.")
        self.num_draws = num_draws
        self.first = first
        self.seed = int(torch.randint(2**31, ()).item()) if seed is None else int(seed)
        self._cache: dict[tuple[str, tuple[int, ...], torch.device], Tensor] = {}

    def rows(self, batch_size: int, device: torch.device) -> Tensor:
        """Which draw each row of the batch belongs to, (B,): the batch is S blocks, draw by draw.

        Raises:
            BaraError: the batch size is not a multiple of S.
        """
        if batch_size % self.num_draws:
            raise BaraError(
                f"A batch of {batch_size} rows cannot hold {self.num_draws} draws: inside "
                f"bara.sampling(model, num_draws={self.num_draws}) the batch must be the inputs "
                f"repeated {self.num_draws} times, draw by draw (bara.predict does this for you)."
            )
        return torch.arange(self.num_draws, device=device).repeat_interleave(
            batch_size // self.num_draws
        )

    def numbers(self, key: str, kind: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The random numbers called `key` of all draws, (S, *shape), float32."""
        cached = self._cache.get((key, shape, device))
        if cached is None:
            sample = torch.randn if kind == "normal" else torch.rand
            name = zlib.crc32(key.encode())
            cached = torch.stack(
                [
                    sample(shape, generator=_generator(self.seed, name, draw))
                    for draw in range(self.first, self.first + self.num_draws)
                ]
            ).to(device)
            self._cache[key, shape, device] = cached
        return cached


def _generator(*entropy: int) -> torch.Generator:
    state = 0
    for number in entropy:  # SplitMix64's mixing, so that neighbouring seeds are unrelated
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


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
