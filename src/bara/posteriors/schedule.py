"""What regularisation follows: a linear rise, and one with what a fit explains of its loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NUM_FIRST = 3
"""Batches whose mean loss is the loss that training began with."""
MEMORY = 0.9
"""Part that earlier batches keep in the running mean of the loss, per batch."""


def rise(value: float, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on, and linear between."""
    return min(1.0, max(0.0, (value - start) / (end - start)))


class LossSchedule(nn.Module):
    """The part of an adapter's KL and noise that its training has earned so far.

    With the share e = 1 - L / L_0 of the first data loss L_0 that the running mean L of later ones
    explains, the part is (e - start) / (end - start), in [0, 1]. An L_0 that is not positive tells
    nothing, and the part is 1; so it is before the first loss.

    A module without tensors: every posterior of the adapter has the same one, and checkpoints keep
    its state with them.

    Attributes:
        start, end: of the rise.
        first: L_0, in the loss's units.
        latest: L.
        count: batches seen, up to `NUM_FIRST`.
    """

    def __init__(self, start: float, end: float) -> None:
        super().__init__()
        self.start, self.end = start, end
        self.first = self.latest = 0.0
        self.count = 0

    def observe(self, loss: float) -> None:
        """Takes in the data loss of one training batch; a batch without labels (NaN) has none."""
        if not math.isfinite(loss):
            return
        if self.count < NUM_FIRST:
            self.count += 1
            self.first += (loss - self.first) / self.count
            self.latest = self.first
        else:
            self.latest = MEMORY * self.latest + (1 - MEMORY) * loss

    @property
    def part(self) -> float:
        """In [0, 1]."""
        if self.count == 0 or self.first <= 0:
            return 1.0
        return rise(1 - self.latest / self.first, self.start, self.end)

    def get_extra_state(self) -> Tensor:
        """What a checkpoint has to keep, (3,)."""
        return torch.tensor([self.first, self.latest, self.count], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Goes on from a checkpoint."""
        self.first, self.latest, count = state.tolist()
        self.count = round(count)
