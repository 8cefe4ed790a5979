"""The loop over draws: as many forward passes as the batch size asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from bara.draws.blocks import Blocks
from bara.draws.draws import Draws, check_draws, source_in_force

Result = TypeVar("Result")


class Portions:
    """S draws of a model, or its posterior mean, or the model as it is if it has no posterior or
    one that is merged or disabled.

    Args:
        model: the model.
        num_draws: S, at least 1; None for the posterior mean. An ensemble has as many draws as
            members, whatever is asked for.
        seed: of the draws.
        per_input: every input has draws of its own, all different, in place of S draws for all.

    Attributes:
        num_draws: how many there are; 1 for the mean.
    """

    def __init__(
        self, model: nn.Module, num_draws: int | None, seed: int, *, per_input: bool = False
    ) -> None:
        num_draws = None if num_draws is None else check_draws(num_draws)
        self.source = source = source_in_force(model)
        self.mean = source is None or num_draws is None
        self.num_draws = 1 if source is None or num_draws is None else source.num_draws(num_draws)
        self.seed = seed
        self.per_input = per_input
        self._used = 0
        self._draws: dict[tuple[int, int], Draws] = {}

    def inputs(self, batch_size: int) -> int:
        """How many inputs a batch of at most `batch_size` rows takes: all draws of one beside each
        other, or one draw at a time where these share no batch."""
        batched = self.source is not None and self.source.batched
        return max(1, batch_size // self.num_draws) if batched else batch_size

    @torch.no_grad()
    def map(self, run: Callable[[Blocks], Result], rows: int, batch_size: int) -> list[Result]:
        """What `run` makes of each portion of the draws, in their order.

        Args:
            run: makes a forward pass whose batch holds these blocks, each of `rows` inputs.
            rows: inputs, n.
            batch_size: most rows in one forward pass, but for one draw of all inputs.
        """
        if self.source is None:
            return [run(Blocks(1))]
        if self.mean:
            with self.source.drawing(None):
                return [run(Blocks(1))]
        fit = batch_size // rows if self.source.batched else 1
        if self.source.shared:
            fit = self.num_draws
        at_once = max(1, min(self.num_draws, fit))
        results = []
        for first in range(0, self.num_draws, at_once):
            count = min(at_once, self.num_draws - first)
            with self.source.drawing(self._portion(first, count, rows)):
                results.append(run(Blocks(count, self.source.shared)))
        return results

    def _portion(self, first: int, count: int, rows: int) -> Draws:
        if self.per_input:
            first, self._used = self._used, self._used + count * rows
            return Draws(count * rows, self.seed, first)
        # kept, because the random numbers of a draw serve all batches
        return self._draws.setdefault((first, count), Draws(count, self.seed, first))
