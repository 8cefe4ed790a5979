"""The KL for trainers that compute their loss themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerState

from bara.adapter.call_inputs import loss_items, share_of
from bara.adapter.elbo import Elbo, adapted_root


class KLMixin:
    """Adds the KL to the loss of a `Trainer` that does not use the model's own.

    `bara.BayesianCallback` does the same in a trainer of any class. The mixin is for a trainer
    without the callback, and where `compute_loss` is called outside of `train`:

        class BayesianSFTTrainer(bara.KLMixin, SFTTrainer): ...

    Where the KL is in the loss already, nothing is added.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The trainer's loss plus `bara.kl_loss`, weighted as the trainer weighs the batch."""
        compute_loss = super().compute_loss  # type: ignore[misc]
        return _with_kl(
            self, Elbo.of(model), compute_loss, model, inputs, return_outputs, num_items_in_batch
        )


def progress_of(state: TrainerState) -> float | None:
    """How far a training is, in [0, 1]; None where its steps are not known."""
    return min(1.0, state.global_step / state.max_steps) if state.max_steps > 0 else None


def add_kl(trainer: Trainer) -> None:
    """Makes a trainer's `compute_loss`, whatever its class computes, the ELBO from now on."""
    if not isinstance(trainer.compute_loss, _ElboLoss):
        trainer.compute_loss = _ElboLoss(trainer)  # type: ignore[method-assign]


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The trainer that is calling a callback, from the stack: transformers hands a callback the
    model and the data, but neither the trainer nor its loss.

    Returns:
        None if no trainer that has this callback is on the stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    return None


class _ElboLoss:
    """A trainer's `compute_loss` with the KL in what it returns."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.compute_loss = trainer.compute_loss

    def __call__(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        elbo = Elbo.of(model)
        with nullcontext() if elbo is None else _in_progress(elbo, self.trainer.state):
            return _with_kl(
                self.trainer,
                elbo,
                self.compute_loss,
                model,
                inputs,
                return_outputs,
                num_items_in_batch,
            )


@contextmanager
def _in_progress(elbo: Elbo, state: TrainerState) -> Iterator[None]:
    """The ELBO knows how far training is, and no longer, also where training stops inside."""
    before = elbo.progress
    if (progress := progress_of(state)) is not None:
        elbo.progress = progress
    try:
        yield
    finally:
        elbo.progress = before


def _with_kl(
    trainer: Any,
    elbo: Elbo | None,
    compute_loss: Callable[..., Any],
    model: Any,
    inputs: Any,
    return_outputs: bool,
    num_items_in_batch: Any,
) -> Any:
    items = None
    if elbo is not None and isinstance(inputs, Mapping):
        items = loss_items(adapted_root(model), dict(inputs))  # a trainer may take labels out
    result = compute_loss(
        model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
    )
    forward = None if elbo is None else elbo.last
    if forward is None or forward.kl is None or forward.kl_given:
        return result
    if not (model.training and torch.is_grad_enabled()):
        return result
    assert elbo is not None
    loss = result[0] if return_outputs else result
    share = _share(trainer, items, num_items_in_batch)
    loss = elbo.complete(loss, forward, share=share, shared=True)
    return (loss, *result[1:]) if return_outputs else loss


def _share(trainer: Any, items: Tensor | None, num_items_in_batch: Any) -> Any:
    """What the KL of a micro-batch is multiplied by, so that those of a step add up to one KL.

    Some losses are scaled by the part that the micro-batch is of the step's batch; the others the
    trainer divides by the number of micro-batches, and the KL with them.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # transformers 5.19
    if scaled is None:
        by_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = by_items or trainer.compute_loss_func is not None
    if not scaled:
        return 1.0
    if items is None or num_items_in_batch is None:
        return 1 / trainer.current_gradient_accumulation_steps
    share: Any = share_of(items, num_items_in_batch)
    if trainer.args.average_tokens_across_devices:
        share = share * (trainer.accelerator.num_processes // trainer.get_tp_size())
    return share
