"""What an adapter makes of its inputs: coordinates in its own rank space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bara.posteriors.posterior import Posterior
from bara.posteriors.rank_space import RankSpace, rms_normalised
from bara.prediction.batches import Batch, Collate, num_rows
from bara.ranks.effective_rank import observed_pass, unlabelled_batches


def adapter_features(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 64,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
) -> Tensor:
    """The adapter's features of every input: A x of its layers under the posterior mean.

    The r numbers of a layer are averaged over an input's tokens and divided by their root mean
    square, so that every layer counts alike in a distance.

    Args:
        model: a model with a Bayesian adapter.
        data, batch_size, collate_fn, progress: as in `bara.predict`.

    Returns:
        (n, sum of the layers' ranks), float32.

    Raises:
        BaraError: no Bayesian adapter is active, or the data cannot be used.
    """
    features: list[Tensor] = []
    order: list[int] = []
    for batch, index in unlabelled_batches(model, data, batch_size, collate_fn, progress):
        features.append(_of_batch(model, batch))
        order += index
    return torch.cat(features)[torch.tensor(order).argsort()]


def _of_batch(model: nn.Module, batch: Batch) -> Tensor:
    uses: dict[str, list[Tensor]] = {}

    def observe(layer: str, posterior: Posterior, space: RankSpace) -> None:
        u = space.mean_over_positions(space.wide_u).float()
        uses.setdefault(layer, []).append(rms_normalised(u).cpu())

    observed_pass(model, batch, observe)
    # a layer used several times, or with several rows per input, counts once
    means = [torch.stack(layer).mean(0) for layer in uses.values()]
    return torch.cat([u.view(num_rows(batch), -1, u.shape[-1]).mean(1) for u in means], dim=1)
