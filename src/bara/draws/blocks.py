"""A batch that holds several draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bara.errors import BaraError


@dataclass(frozen=True)
class Blocks:
    """S blocks of rows, draw by draw: the inputs once for every draw.

    Attributes:
        num_draws: S.
        shared: the draws share a forward pass of the inputs, once, and its outputs are the blocks.
    """

    num_draws: int
    shared: bool = False

    def repeat(self, batch: Mapping[str, Any], rows: int | None = None) -> dict[str, Any]:
        """A batch of inputs as S blocks; what is no tensor of rows stays as it is.

        Args:
            batch: tensors by name, whose first dimension is the rows', also in mappings.
            rows: if given, tensors of another length stay as they are too.
        """
        if self.shared:
            return dict(batch)
        return {name: self._repeated(value, rows) for name, value in batch.items()}

    def _repeated(self, value: Any, rows: int | None) -> Any:
        if isinstance(value, dict):  # such as a mask for each type of layer
            return self.repeat(value, rows)
        if isinstance(value, Tensor) and value.dim() and rows in (None, value.shape[0]):
            return value.repeat(self.num_draws, *[1] * (value.dim() - 1))
        return value

    def split(self, values: Tensor) -> Tensor:
        """Values of all rows, (S n, ...), by draw, (S, n, ...)."""
        return values.unflatten(0, (self.num_draws, -1))

    def draw_of_rows(self, batch_size: int, device: torch.device) -> Tensor:
        """The number of each row's block, (B,).

        Raises:
            BaraError: the batch size is not a multiple of S.
        """
        if batch_size % self.num_draws:
            raise BaraError(
                f"A batch of {batch_size} rows cannot hold {self.num_draws} draws: inside "
                f"bara.sampling(model, num_draws={self.num_draws}) the batch must be the inputs "
                f"repeated {self.num_draws} times, draw by draw (bara.predict does this for you)."
            )
        rows = batch_size // self.num_draws
        return torch.arange(self.num_draws, device=device).repeat_interleave(rows)


def log_mean_exp(log_probs_draws: Tensor) -> Tensor:
    """(...) logarithm of the mean over draws of probabilities whose logarithms are (S, ...)."""
    return log_probs_draws.logsumexp(0) - math.log(log_probs_draws.shape[0])
