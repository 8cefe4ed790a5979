"""The joint effective rank: how many factors a task and an input use (design 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bara.batches import Collate, batches, to_device
from bara.errors import BaraError
from bara.posteriors.base import Posterior, RankSpace
from bara.training import elbo_of


@dataclass(frozen=True)
class EffectiveRank:
    """Effective rank by layer and input.

    Attributes:
        layers: names of the L adapted layers.
        max_rank: the rank r of each layer.
        soft: sum over factors of P(z_k g_k(x) > 0), (L, n).
        hard: number of factors with P(z_k g_k(x) > 0) > 1/2, (L, n).

    With token gates both are means over an input's tokens.
    """

    layers: tuple[str, ...]
    max_rank: tuple[int, ...]
    soft: Tensor
    hard: Tensor

    @property
    def s_bar(self) -> float:
        """Mean over layers and inputs, the quantity the paper's bound depends on."""
        return float(self.soft.mean())

    @property
    def per_layer(self) -> Tensor:
        """Mean over inputs, (L,)."""
        return self.soft.mean(dim=1)

    @property
    def per_input(self) -> Tensor:
        """Mean over layers, (n,)."""
        return self.soft.mean(dim=0)

    def __str__(self) -> str:
        rows = [
            f"{name}: {mean:.2f} of {rank}"
            for name, mean, rank in zip(self.layers, self.per_layer, self.max_rank, strict=True)
        ]
        return "\n".join([f"effective rank s_bar = {self.s_bar:.2f}", *rows])


def effective_rank(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 64,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
) -> EffectiveRank:
    """The effective rank of every layer for every input, in the posterior-mean mode.

    A family without gates has its full rank everywhere.

    Args:
        model: a model with a Bayesian adapter.
        data: a tokenised `datasets.Dataset`, a DataLoader or one batch.
        batch_size, collate_fn, progress: as in `bara.predict`.

    Raises:
        BaraError: no Bayesian adapter is active, or the data cannot be used.
    """
    uses: dict[str, list[tuple[Tensor, Tensor]]] = {}
    owners: dict[str, Posterior] = {}

    def observe(layer: str, posterior: Posterior, space: RankSpace) -> None:
        if owners.setdefault(layer, posterior) is not posterior:
            raise BaraError(
                "Two Bayesian adapters are active together: choose the one whose rank you want "
                "with model.set_adapter(name)."
            )
        probability = posterior.open_probability(space)
        count = (probability > 0.5).sum(-1).to(probability.dtype)
        soft = space.mean_over_positions(probability.sum(-1))
        uses.setdefault(layer, []).append((soft.cpu(), space.mean_over_positions(count).cpu()))

    parts: list[Tensor] = []  # (2, L, n) per batch
    order: list[int] = []
    for index in _observed(model, data, observe, batch_size, collate_fn, progress):
        # a layer used several times, or with several rows per input, counts once
        means = [
            torch.stack([torch.stack(use) for use in layer]).mean(0).view(2, len(index), -1).mean(2)
            for layer in uses.values()
        ]
        parts.append(torch.stack(means, dim=1))
        order += index
        uses.clear()
    soft, hard = torch.cat(parts, dim=2)[:, :, torch.tensor(order).argsort()]
    ranks = tuple(posterior.rank for posterior in owners.values())
    return EffectiveRank(tuple(owners), ranks, soft, hard)


def calibrate_gates(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 64,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
) -> None:
    """Fixes input-dependent gates at their average over data, for merging only.

    Afterwards `merge_adapter` and `merge_and_unload` merge the approximation
    W0 + s B diag(E[z] mean_x E[g(x)]) A; forward passes of the unmerged adapter stay exact. Merging
    without it is refused, because a gate that depends on the input has no merged form.

    Args and errors are those of `effective_rank`.
    """
    totals: dict[Posterior, Tensor] = {}
    weights: dict[Posterior, int] = {}

    def observe(layer: str, posterior: Posterior, space: RankSpace) -> None:
        mean = posterior.expected_input_multiplier(space)
        if mean is not None:
            rows = space.u.shape[0]
            totals[posterior] = totals.get(posterior, torch.zeros_like(mean)) + rows * mean
            weights[posterior] = weights.get(posterior, 0) + rows

    for _ in _observed(model, data, observe, batch_size, collate_fn, progress):
        pass
    for posterior, total in totals.items():
        posterior.calibrated_gate = total / weights[posterior]


def _observed(
    model: nn.Module,
    data: Any,
    observe: Callable[[str, Posterior, RankSpace], None],
    batch_size: int,
    collate_fn: Collate | None,
    progress: bool | None,
) -> Iterator[list[int]]:
    """Runs the data through the model in mean mode with an observer; yields each batch's rows."""
    elbo = elbo_of(model)
    device = next(model.parameters()).device
    called = False

    def wrapped(layer: str, posterior: Posterior, space: RankSpace) -> None:
        nonlocal called
        called = True
        observe(layer, posterior, space)

    for batch, index in batches(data, model, batch_size, collate_fn, progress, "ranks"):
        batch.pop("labels", None)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), elbo.drawing(None), elbo.observing(wrapped):
                model(**to_device(batch, device))
        finally:
            model.train(was_training)
        if not called:
            raise BaraError(
                "No Bayesian adapter is active: enable it, and unmerge it if it is merged."
            )
        yield index
