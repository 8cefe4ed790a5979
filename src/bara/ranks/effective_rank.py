"""The joint effective rank: how many factors a task and an input use (design 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bara.adapter.elbo import elbo_of
from bara.adapter.forward_pass import Observer
from bara.draws.blocks import Blocks
from bara.draws.draws import Draws, FixedNoise, check_draws
from bara.draws.sharing import evaluating
from bara.errors import BaraError
from bara.language.prompts import is_encoder_decoder
from bara.posteriors.posterior import Posterior
from bara.posteriors.rank_space import RankSpace
from bara.prediction.batches import NO_INPUTS, Batch, Collate, batches, num_rows, to_device


@dataclass(frozen=True)
class EffectiveRank:
    """Effective rank by layer and input.

    Attributes:
        layers: names of the L adapted layers.
        max_rank: the rank r of each layer.
        soft: sum over factors of P(z_k g_k(x) > 0), (L, n).
        hard: number of factors with P(z_k g_k(x) > 0) > 1/2, (L, n).
        draws: number of factors with z_k g_k(x) > 0 in each of S posterior draws, (S, L, n);
            None unless draws were asked for.

    With token gates all are means over an input's tokens.
    """

    layers: tuple[str, ...]
    max_rank: tuple[int, ...]
    soft: Tensor
    hard: Tensor
    draws: Tensor | None = None

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

    @property
    def s_bar_std(self) -> float | None:
        """Standard deviation over draws of the mean count; None without two draws."""
        spread = self._spread((1, 2))
        return None if spread is None else float(spread)

    @property
    def per_layer_std(self) -> Tensor | None:
        """Standard deviation over draws of each layer's mean count, (L,)."""
        return self._spread((2,))

    @property
    def per_input_std(self) -> Tensor | None:
        """Standard deviation over draws of each input's mean count, (n,)."""
        return self._spread((1,))

    def _spread(self, over: tuple[int, ...]) -> Tensor | None:
        if self.draws is None or len(self.draws) < 2:
            return None
        return self.draws.mean(dim=over).std(dim=0)

    def __str__(self) -> str:
        rows = [
            f"{name}: {mean:.2f} of {rank}"
            for name, mean, rank in zip(self.layers, self.per_layer, self.max_rank, strict=True)
        ]
        return "\n".join([f"effective rank s_bar = {self.s_bar:.2f}", *rows])


@dataclass(frozen=True)
class RankShift:
    """How the effective rank differs between two data sets: the other minus the first.

    Attributes:
        mean: difference of the means over layers and inputs.
        standard_error: of `mean`, over inputs (Welch).
        per_layer: difference of each layer's mean, (L,).
        auroc: probability that an input of the other set has a higher rank, mean over layers,
            than one of the first set; ties count half.
    """

    mean: float
    standard_error: float
    per_layer: Tensor
    auroc: float


def rank_shift(first: EffectiveRank, other: EffectiveRank) -> RankShift:
    """Compares the effective ranks of one model on two data sets.

    Raises:
        BaraError: the ranks are of different models, or a data set has fewer than two inputs.
    """
    from sklearn.metrics import roc_auc_score

    if first.layers != other.layers:
        raise BaraError("A rank shift needs the ranks of one model: the layers differ.")
    ours, theirs = first.per_input.double(), other.per_input.double()
    if min(len(ours), len(theirs)) < 2:
        raise BaraError("A rank shift needs at least two inputs in each data set.")
    variance = ours.var() / len(ours) + theirs.var() / len(theirs)
    other_set = torch.cat([torch.zeros_like(ours), torch.ones_like(theirs)])
    return RankShift(
        mean=float(theirs.mean() - ours.mean()),
        standard_error=float(variance.sqrt()),
        per_layer=other.per_layer - first.per_layer,
        auroc=float(roc_auc_score(other_set, torch.cat([ours, theirs]))),
    )


def effective_rank(
    model: nn.Module,
    data: Any,
    *,
    num_draws: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
) -> EffectiveRank:
    """The effective rank of every layer for every input.

    `soft` and `hard` are those of the posterior-mean mode. A family without gates has its full
    rank everywhere.

    Args:
        model: a model with a Bayesian adapter.
        data: a tokenised `datasets.Dataset`, a DataLoader or one batch.
        num_draws: S, posterior draws whose active factors are counted too; the draws are those of
            `bara.sampling(model, S, seed)`.
        seed: of the draws.
        batch_size, collate_fn, progress: as in `bara.predict`.

    Raises:
        BaraError: no Bayesian adapter is active, num_draws < 0, or the data cannot be used.
    """
    num_draws = check_draws(num_draws, least=0)
    owners: dict[str, Posterior] = {}
    draws = Draws(num_draws, seed) if num_draws else None

    def probable(layer: str, posterior: Posterior, space: RankSpace) -> Tensor:
        if owners.setdefault(layer, posterior) is not posterior:
            raise BaraError(
                "Two Bayesian adapters are active together: choose the one whose rank you want "
                "with model.set_adapter(name)."
            )
        probability = posterior.open_probability(space)
        count = (probability > 0.5).to(probability.dtype)
        both = [space.mean_over_positions(p.sum(-1)) for p in (probability, count)]
        return torch.stack(both)

    def sampled(layer: str, posterior: Posterior, space: RankSpace) -> Tensor:
        assert draws is not None
        rows = draws.rows(space.u.shape[0], space.u.device)
        opened = posterior.open_draw(space, FixedNoise(draws, rows, layer))
        return space.mean_over_positions(opened.sum(-1).float()).view(num_draws, -1)

    means: list[Tensor] = []  # (2, L, n) per batch
    counts: list[Tensor] = []  # (S, L, n) per batch
    order: list[int] = []
    size = max(1, batch_size // max(1, num_draws)) if batch_size > 0 else batch_size
    for batch, index in unlabelled_batches(model, data, size, collate_fn, progress):
        means.append(_by_layer(model, batch, probable))
        if draws is not None:
            counts.append(_by_layer(model, batch, sampled, draws))
        order += index
    position = torch.tensor(order).argsort()
    soft, hard = torch.cat(means, dim=2)[:, :, position]
    ranks = tuple(posterior.rank for posterior in owners.values())
    sampled_counts = torch.cat(counts, dim=2)[:, :, position] if counts else None
    return EffectiveRank(tuple(owners), ranks, soft, hard, sampled_counts)


def calibrate_gates(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 64,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
) -> None:
    """Fixes what depends on the input at its average over data, for merging and export only.

    Afterwards `merge_adapter` and `merge_and_unload` merge the approximation
    W0 + s B diag(E[z] mean_x E[g(x)]) A; forward passes of the unmerged adapter stay exact. Merging
    without it is refused, because a gate that depends on the input has no merged form. BaLoRA,
    which merges exactly, has its noise level averaged, for `bara.export_lora`'s draws.

    Args and errors are those of `effective_rank`.
    """
    totals: dict[Posterior, Tensor] = {}
    weights: dict[Posterior, int] = {}
    factors: dict[Posterior, Tensor] = {}

    def observe(layer: str, posterior: Posterior, space: RankSpace) -> None:
        mean = posterior.input_dependence(space)
        if mean is not None:
            rows = space.u.shape[0]
            totals[posterior] = totals.get(posterior, torch.zeros_like(mean)) + rows * mean
            weights[posterior] = weights.get(posterior, 0) + rows
            factors[posterior] = space.a

    for batch, _ in unlabelled_batches(model, data, batch_size, collate_fn, progress):
        observed_pass(model, batch, observe)
    for posterior, total in totals.items():
        posterior.calibrate(total / weights[posterior], factors[posterior])


def unlabelled_batches(
    model: nn.Module,
    data: Any,
    batch_size: int,
    collate_fn: Collate | None,
    progress: bool | None,
) -> Iterator[tuple[Batch, list[int]]]:
    """The data's batches on the model's device, without labels, and each batch's rows.

    A decoder behind an encoder keeps its labels, of which it makes its inputs.
    """
    device, encodes = next(model.parameters()).device, is_encoder_decoder(model)
    for batch, index in batches(data, model, batch_size, collate_fn, progress, "ranks"):
        read = {name: value for name, value in batch.items() if name not in NO_INPUTS}
        labels = batch.get("labels")
        if encodes and isinstance(labels, Tensor) and labels.dim() > 1:
            read["labels"] = labels
        yield to_device(read, device), index


def observed_pass(
    model: nn.Module, batch: Batch, observe: Observer, draws: Draws | None = None
) -> None:
    """One forward pass in evaluation mode in which `observe` is called by every adapted layer.

    Args:
        draws: makes the pass under these draws, of the batch repeated once for each; None for the
            posterior mean.

    Raises:
        BaraError: no Bayesian adapter took part.
    """
    elbo = elbo_of(model)
    called = False

    def wrapped(layer: str, posterior: Posterior, space: RankSpace) -> None:
        nonlocal called
        called = True
        observe(layer, posterior, space)

    blocks = Blocks(1 if draws is None else draws.num_draws)
    with evaluating(model), torch.no_grad(), elbo.drawing(draws), elbo.observing(wrapped):
        model(**blocks.repeat(batch))
    if not called:
        raise BaraError("No Bayesian adapter is active: enable it, and unmerge it if it is merged.")


def _by_layer(
    model: nn.Module,
    batch: Batch,
    count: Callable[[str, Posterior, RankSpace], Tensor],
    draws: Draws | None = None,
) -> Tensor:
    """What `count` makes of each layer, (K, rows), as (K, L, n)."""
    uses: dict[str, list[Tensor]] = {}

    def observe(layer: str, posterior: Posterior, space: RankSpace) -> None:
        uses.setdefault(layer, []).append(count(layer, posterior, space).cpu())

    observed_pass(model, batch, observe, draws)
    # a layer used several times, or with several rows per input, counts once
    means = [torch.stack(layer).mean(0) for layer in uses.values()]
    return torch.stack([m.view(len(m), num_rows(batch), -1).mean(2) for m in means], dim=1)
