"""One call of the adapted model: what its layers read, and the KL that they hand up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bara.draws.draws import Draws, FixedNoise, FreshNoise, Noise
from bara.draws.processes import own_seed
from bara.posteriors.fused import FusedLayer
from bara.posteriors.posterior import Kl, Posterior
from bara.posteriors.rank_space import RankSpace, SharedInput

Observer = Callable[[str, Posterior, RankSpace], None]
"""Is called with a layer's name, its posterior and what the posterior works on."""


class LayerUse(NamedTuple):
    """What one use of a module handed up: its posterior, what its KL is made of, and how.

    The uses of a pass are a chain from the latest to the first, and have no names: for a list, or
    for names, a compiler of single layers would make a graph for each of them.
    """

    posterior: nn.Module
    parts: Mapping[str, Tensor]
    kl: Callable[[Mapping[str, Tensor]], Kl]
    before: LayerUse | None

    def kind(self) -> tuple[object, ...]:
        """The same for uses whose KL can be computed together."""
        shapes = ((name, part.shape, part.dtype) for name, part in self.parts.items())
        return getattr(self.kl, "__func__", self.kl), *shapes


@dataclass
class KlTerms:
    """The KL terms of one adapter in one forward pass.

    Layers hand up their uses, which are reduced when the pass is over: recomputation under gradient
    checkpointing repeats what a layer did, and the reduction must not be part of it. A layer that
    is applied several times (shared weights) has one posterior, and its KL is the mean over its
    uses.

    Attributes:
        latest: the latest use, until the pass is over.
        kl_global, kl_local: summed over the layers and averaged over the batch, scalars; None
            without such terms.
        activity: P(active) of the factors of layers alike, (L, ..., r), and the L posteriors.
    """

    latest: LayerUse | None = None
    kl_global: Tensor | None = None
    kl_local: Tensor | None = None
    activity: list[tuple[list[nn.Module], Tensor]] = field(default_factory=list)

    def uses(self) -> list[LayerUse]:
        """All uses of the pass, the first one first."""
        uses, use = [], self.latest
        while use is not None:
            uses.append(use)
            use = use.before
        return uses[::-1]

    def detach(self) -> None:
        """Lets go of the graph."""
        self.kl_global = None if self.kl_global is None else self.kl_global.detach()
        self.kl_local = None if self.kl_local is None else self.kl_local.detach()


@dataclass
class Reached:
    """Which gradients of a pass have been computed."""

    kl: bool = False
    data: bool = False


@dataclass(eq=False)
class ForwardPass:
    """One call of the adapted model.

    Attributes:
        batch_size: rows B of the batch.
        weights: for each padding mask given to the model what a position counts in a mean over its
            row, (B, T): 0 for padding.
        items: loss terms of each row, (B,): its weight in the mean over the batch; None for ones.
        share: part of the whole accumulated batch that this micro-batch is, 1 if unknown.
        loss_terms: terms of an input that the model's own loss is the mean of: the KL is divided
            by their number too.
        draws: the draws in force, or None (fresh noise in training, else the mean).
        adapter_names: PEFT's adapter per row of a mixed batch.
        training: whether KL is collected: train mode with gradients.
        observers: told of every layer.
        terms: KL collected, by adapter.
        trainable: whether a layer that can be trained took part.
        asked: whether a layer was asked for its KL.
        kl: the weighted KL, until it is in a loss.
        kl_in_loss: whether it is in one.
        kl_given: whether `kl_loss` gave it to whoever computes a loss.
        before: an earlier training pass whose KL nobody has taken yet.
        shared: the latest input of a layer, which its siblings may read too, and whose it is.
        seed: of the fused layers' fresh noise; None where none is drawn.
        fuse: whether layers may be prepared together (`adapter/fused_pass`).
        fused: those that are, by adapter, precision of the projections and whether there are
            gradients, by name.
    """

    batch_size: int
    weights: tuple[Tensor, ...] = ()
    items: Tensor | None = None
    share: Tensor | float = 1.0
    loss_terms: int = 1
    draws: Draws | None = None
    adapter_names: tuple[str, ...] | None = None
    training: bool = False
    observers: tuple[Observer, ...] = ()
    terms: dict[str, KlTerms] = field(default_factory=dict)
    trainable: bool = False
    asked: bool = False
    open: bool = True
    kl: Tensor | None = None
    kl_in_loss: bool = False
    kl_given: bool = False
    before: ForwardPass | None = None
    reached: Reached = field(default_factory=Reached)
    shared: tuple[SharedInput, tuple[object, ...]] | None = None
    fuse: bool = False
    seed: int | None = None
    fused: dict[tuple[object, ...], dict[str, FusedLayer]] = field(default_factory=dict)

    @property
    def awaits_loss(self) -> bool:
        """Whether its KL is there, and neither in a loss nor given away, nor the pass over."""
        return self.kl is not None and not (self.kl_in_loss or self.kl_given or self.reached.data)

    def draw_seed(self) -> None:
        """Takes a seed for fresh noise from torch's global generator."""
        self.seed = own_seed()

    def input_of(self, x: Tensor, layer: str) -> SharedInput:
        """A layer's input, shared by the layers of one module that read the same (q, k, v).

        Not beyond the module: what is checkpointed has to compute the same again on its own.
        """
        # an inference tensor has no version: it may have been changed in place; and a compiler sees
        # by itself what is computed twice
        if torch.compiler.is_compiling() or x.is_inference():
            return SharedInput(x)
        needs_grad = x.requires_grad and torch.is_grad_enabled()
        key = (layer.rpartition(".")[0], x._version, needs_grad)
        if self.shared is None or self.shared[0].x is not x or self.shared[1] != key:
            self.shared = SharedInput(x), key
        return self.shared[0]

    def position_weights(self, positions: int, rows: Tensor | None) -> Tensor | None:
        """The weights (B, T) for a layer with T positions per row, None without a mask for it."""
        for weights in self.weights:
            if weights.shape[1] == positions:
                return weights if rows is None else weights[rows]
        return None

    def rows_of(self, adapter: str, device: torch.device) -> Tensor | None:
        """Rows (B',) of the batch that an adapter works on in a mixed batch; None for all."""
        if self.adapter_names is None:
            return None
        repeat = self.batch_size // len(self.adapter_names)  # beams
        names = [name for name in self.adapter_names for _ in range(repeat)]
        return torch.tensor([i for i, name in enumerate(names) if name == adapter], device=device)

    def noise(
        self, layer: str, rows: Tensor | None, batch_size: int, device: torch.device, train: bool
    ) -> Noise | None:
        """A layer's random numbers for its rows; None for the posterior mean."""
        if self.draws is not None:
            draw = self.draws.rows(self.batch_size, device)
            return FixedNoise(self.draws, draw if rows is None else draw[rows], layer)
        return FreshNoise(batch_size, device) if train else None

    def mean_over_rows(self, values: Tensor) -> Tensor:
        """The mean of values (L, B) over the rows, each weighted by its loss terms; (L,) passes."""
        if values.dim() == 1:
            return values
        if self.row_weights is None or self.row_weights.shape != values.shape[1:]:
            return values.mean(dim=1)
        return values @ self.row_weights.to(values)

    @cached_property
    def row_weights(self) -> Tensor | None:
        """What each row counts in a mean over the batch, (B,)."""
        if self.items is None:
            return None
        return self.items / self.items.sum().clamp_min(1)

    def add(
        self,
        adapter: str,
        posterior: nn.Module,
        parts: Mapping[str, Tensor],
        kl: Callable[[Mapping[str, Tensor]], Kl],
    ) -> None:
        """Collects one layer's KL; recomputation under gradient checkpointing adds nothing."""
        if not self.open:
            return
        self.asked = True
        if parts:  # else a family without KL
            if dist.is_available() and dist.is_initialized():
                parts = {name: _kept(part) for name, part in parts.items()}
            terms = self.terms.setdefault(adapter, KlTerms())
            terms.latest = LayerUse(posterior, parts, kl, terms.latest)

    def reduce(self) -> None:
        """Computes the terms of what the layers have handed up, layers alike together."""
        for terms in self.terms.values():
            every, terms.latest = terms.uses(), None
            counts = Counter(use.posterior for use in every)
            alike: dict[tuple[object, ...], list[LayerUse]] = {}
            for use in every:
                alike.setdefault(use.kind(), []).append(use)
            for uses in alike.values():
                parts = {
                    name: torch.stack([use.parts[name].to(part.device) for use in uses])
                    for name, part in uses[0].parts.items()
                }
                share = torch.tensor([1 / counts[use.posterior] for use in uses])
                device = next(iter(parts.values())).device.type
                with torch.autocast(device, enabled=False):
                    kl = uses[0].kl(parts)
                    terms.kl_global = self._plus(terms.kl_global, kl.parameters, share)
                    terms.kl_local = self._plus(terms.kl_local, kl.local, share)
                if kl.activity is not None:
                    posteriors = [use.posterior for use in uses]
                    terms.activity.append((posteriors, kl.activity.detach()))

    def _plus(self, total: Tensor | None, values: Tensor | None, share: Tensor) -> Tensor | None:
        if values is None:
            return total
        term = (self.mean_over_rows(values) * share.to(values)).sum()
        return term if total is None else total + term.to(total.device)

    def take_kl(self) -> Tensor:
        """The weighted KL, which is from now on part of a loss; the pass lets go of its graph."""
        assert self.kl is not None
        kl, self.kl, self.kl_in_loss = self.kl, None, True
        for terms in self.terms.values():
            terms.detach()
        return kl

    def for_recomputation(self) -> ForwardPass:
        """What a layer needs when it runs again in the backward pass, without the graph."""
        return replace(self, open=False, terms={}, kl=None)


def _kept(part: Tensor) -> Tensor:
    """What a KL is made of, copied where it is a parameter or a view of one: FSDP takes these away
    after the layer, and the KL is computed when the pass is over."""
    owner = part if part._base is None else part._base
    return part.clone() if owner.is_leaf else part
