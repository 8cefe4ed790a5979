"""Regularisation that follows what a fit has explained of its loss."""

from __future__ import annotations

from dataclasses import dataclass

NUM_FIRST = 3
"""Batches whose mean loss is the loss that training began with."""
MEMORY = 0.9
"""Part that earlier batches keep in the running mean of the loss, per batch."""


@dataclass
class LossSchedule:
    """The part of an adapter's KL and noise that its training has earned so far.

    With the share e = 1 - L / L_0 of the first data loss L_0 that the running mean L of later ones
    explains, the part is (e - start) / (end - start), in [0, 1]. An L_0 that is not positive tells
    nothing, and the part is 1; so it is before the first loss.

    Attributes:
        start, end: of the rise.
        first: L_0, in the loss's units.
        latest: L.
        count: batches seen, up to `NUM_FIRST`.
    """

    start: float
    end: float
    first: float = 0.0
    latest: float = 0.0
    count: int = 0

    def observe(self, loss: float) -> None:
        """Takes in the data loss of one training batch."""
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
        explained = 1 - self.latest / self.first
        return min(1.0, max(0.0, (explained - self.start) / (self.end - self.start)))

    @property
    def state(self) -> list[float]:
        """What a checkpoint has to keep."""
        return [self.first, self.latest, self.count]

    @state.setter
    def state(self, values: list[float]) -> None:
        self.first, self.latest = values[:2]
        self.count = round(values[2])
