"""The KL and the ELBO for a loss of one's own, and the log of KL and effective rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bara.adapter.call_inputs import counted, share_of
from bara.adapter.elbo import Elbo, elbo_of
from bara.adapter.forward_pass import KlTerms
from bara.adapter.layer import adapted_layers
from bara.errors import BaraError

CLOSED = 0.1
"""Mean effective rank of a layer below which an adapter does next to nothing."""


def kl_loss(model: nn.Module) -> Tensor:
    """The weighted KL of the last forward pass, to be added to a loss of your own.

    Use it when the loss is computed from `outputs.logits`; when labels are given to the model its
    `outputs.loss` already contains the KL.

    Args:
        model: with a Bayesian adapter.

    Returns:
        A scalar: kl_weight / N * KL_global + local_kl_weight * KL_local, times the warm-up
        (design 2.4). Add it to a data loss that is the mean over the batch.

    Raises:
        BaraError: there was no training pass, its KL is in outputs.loss already, or the model has
            no Bayesian adapter.
    """
    return elbo_of(model).kl_loss()


def elbo_loss(
    model: nn.Module, data_loss: Callable[[Any, Tensor], Tensor]
) -> Callable[..., Tensor]:
    """The ELBO with a data loss of your own, for `Trainer(compute_loss_func=...)`.

    Args:
        model: the model that the Trainer trains; without a Bayesian adapter, and in evaluation,
            the loss is the data loss alone.
        data_loss: of the model's outputs and the labels, a mean over the labels of the batch, such
            as `gaussian_nll`.

    Returns:
        A function of (outputs, labels, num_items_in_batch=None): data loss plus `kl_loss`, times
        the share that these labels are of the `num_items_in_batch` of all accumulated batches.
    """

    def loss(
        outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if labels is None:
            raise BaraError("elbo_loss: the batch has no labels; add a `labels` column.")
        elbo = Elbo.of(model)
        training = elbo is not None and model.training and torch.is_grad_enabled()
        forward = elbo.last if training and elbo is not None else None
        if forward is not None and forward.kl_in_loss:
            raise BaraError(
                "elbo_loss: the KL of this step is in outputs.loss already, because labels were "
                "given to the model."
            )
        share = share_of(labels.ne(-100), num_items_in_batch)
        total = data_loss(outputs, labels)
        if elbo is None:
            return share * counted(total, share)
        return elbo.complete(total, forward, share=share)

    return loss


def kl_terms(model: nn.Module) -> dict[str, float]:
    """The unweighted KL terms in nats and the effective rank of the last training pass.

    Returns:
        `kl_global`, `kl_local` and `effective_rank` (mean over layers and inputs), as far as the
        active adapters have them; empty before the first training pass.
    """
    last = elbo_of(model).last
    if last is None:
        return {}
    values: dict[str, float] = {}
    for adapter, terms in last.terms.items():
        for name, kl in (("kl_global", terms.kl_global), ("kl_local", terms.kl_local)):
            if kl is not None:
                values[name] = values.get(name, 0.0) + float(kl.detach())
        ranks = [rank for _, rank in _ranks(terms)]
        if ranks:
            values["effective_rank"] = sum(ranks) / len(ranks)
            _warn_if_closed(adapter, values["effective_rank"])
    return values


def rank_terms(model: nn.Module) -> dict[str, float]:
    """The effective rank of the last training pass, for logs.

    Returns:
        `s_bar`, its mean over layers and inputs, and `effective_rank/q_proj` and so on, of the
        layers of that name; empty where no active adapter has one.
    """
    last = elbo_of(model).last
    by_type: dict[str, list[float]] = {}
    for adapter, terms in last.terms.items() if last is not None else ():
        types = {id(p): _type_of(name) for name, _, p in adapted_layers(model, adapter)}
        for posterior, rank in _ranks(terms):
            by_type.setdefault(types[id(posterior)], []).append(rank)
    every = [rank for found in by_type.values() for rank in found]
    values = {"s_bar": sum(every) / len(every)} if every else {}
    return values | {f"effective_rank/{kind}": sum(r) / len(r) for kind, r in by_type.items()}


def _ranks(terms: KlTerms) -> Iterator[tuple[nn.Module, float]]:
    """Posterior and effective rank, a mean over inputs, of each layer."""
    for posteriors, activity in terms.activity:
        by_layer = activity.sum(-1).reshape(len(activity), -1).mean(1)
        yield from zip(posteriors, by_layer.tolist(), strict=True)


def _type_of(name: str) -> str:
    """What a layer is called in every block of the model: `q_proj` of `layers.0.attn.q_proj`."""
    parts = name.split(".")
    return next((part for part in reversed(parts) if not part.isdecimal()), name)


def _warn_if_closed(adapter: str, effective_rank: float) -> None:
    if effective_rank < CLOSED:
        warnings.warn(
            f"Nearly all gates of adapter {adapter!r} are closed (effective rank "
            f"{effective_rank:.3f}): it hardly changes the base model, and closed gates rarely "
            "open again. Lower the learning rate, or kl_weight.",
            stacklevel=3,
        )
