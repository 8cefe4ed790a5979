"""What training needs besides the loss: N, the warm-up, and a log of KL and effective rank."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bara.adapter.call_inputs import predicts_next_token
from bara.adapter.elbo import Elbo, adapted_root, elbo_of
from bara.adapter.layer import adapted_layers
from bara.errors import BaraError

MIN_LOG_VARIANCE = -10.0
"""Noise of 0.7% of the targets' standard deviation, the least that `gaussian_nll` tells apart."""


def kl_loss(model: nn.Module, data_loss: Tensor | None = None) -> Tensor:
    """The weighted KL of the last forward pass, to be added to a loss of your own.

    Use it when the loss is computed from `outputs.logits`; when labels are given to the model its
    `outputs.loss` already contains the KL.

    Args:
        model: with a Bayesian adapter.
        data_loss: the step's, a scalar; adapters with `explained` follow it.

    Returns:
        A scalar: kl_weight / N * KL_global + local_kl_weight * KL_local, times the warm-up
        (design 2.4). Add it to a data loss that is the mean over the batch.

    Raises:
        BaraError: there was no training pass, its KL is in outputs.loss already, the model has no
            Bayesian adapter, or one that needs `data_loss`.
    """
    return elbo_of(model).kl_loss(data_loss)


def gaussian_nll(outputs: Any, labels: Tensor) -> Tensor:
    """Negative log-likelihood of a Gaussian whose mean and variance both depend on the input.

    D. A. Nix and A. S. Weigend, "Estimating the mean and variance of the target probability
    distribution", ICNN 1994, doi:10.1109/ICNN.1994.374138.

    Args:
        outputs: a model's outputs with `logits` (B, 2): mean and log-variance. Work in units in
            which the targets have a standard deviation near 1.
        labels: (B,) or (B, 1) targets.

    Returns:
        A scalar in nats: the mean over the batch of
        (log(2 pi) + log_var + (y - mean)^2 / exp(log_var)) / 2. The log-variance counts as -10 at
        least: the likelihood of a target that is fitted exactly grows without bound as its
        variance shrinks, and so do the gradients of its neighbours. A large variance is safe.

    Raises:
        BaraError: the logits are not two per label.
    """
    logits = outputs["logits"].float()
    if logits.shape != (labels.numel(), 2):
        raise BaraError(
            f"gaussian_nll needs two outputs per label (mean and log-variance), got logits of the "
            f"shape {tuple(logits.shape)} for {labels.numel()} labels: set num_labels=2."
        )
    mean, log_variance = logits[:, 0], logits[:, 1].clamp(min=MIN_LOG_VARIANCE)
    squared_error = (labels.flatten().to(mean) - mean).square()
    nll = math.log(2 * math.pi) + log_variance + squared_error * torch.exp(-log_variance)
    return 0.5 * nll.mean()


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
        total = data_loss(outputs, labels)
        elbo = Elbo.of(model)
        training = model.training and torch.is_grad_enabled()
        if elbo is not None and training and elbo.last is not None and elbo.last.kl is not None:
            total = total + elbo.kl_loss(total).to(total.device)
        if num_items_in_batch is not None:
            total = total * (labels.ne(-100).sum() / num_items_in_batch)
        return total

    return loss


def set_progress(model: nn.Module, fraction: float, num_steps: int | None = None) -> None:
    """Tells a Bayesian adapter how far training is; `BayesianCallback` does this in a Trainer.

    Args:
        model: a model with a Bayesian adapter.
        fraction: optimiser steps done over optimiser steps in all, in [0, 1]: for the KL's warm-up.
        num_steps: optimiser steps in all: defaults that depend on them are adjusted (BaRA's
            `weight_noise`); None leaves them.

    Raises:
        BaraError: the fraction is outside [0, 1], or num_steps below 1.
    """
    if not 0 <= fraction <= 1:
        raise BaraError(f"set_progress: fraction must be in [0, 1], got {fraction!r}.")
    if num_steps is not None and num_steps < 1:
        raise BaraError(f"set_progress: num_steps must be at least 1, got {num_steps!r}.")
    elbo = elbo_of(model)
    elbo.progress = fraction
    if num_steps is not None:
        _set_by_steps(model, elbo, num_steps)


def _set_by_steps(model: nn.Module, elbo: Elbo, num_steps: int) -> None:
    """Adjusts the configurations of the adapters in training."""
    for name, config in elbo.configs.items():
        posteriors = (posterior for _, _, posterior in adapted_layers(model, name))
        if any(p.requires_grad for posterior in posteriors for p in posterior.parameters()):
            config.set_by_steps(num_steps)


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
    for terms in last.terms.values():
        for name, kl in (("kl_global", terms.kl_global), ("kl_local", terms.kl_local)):
            if kl is not None:
                values[name] = values.get(name, 0.0) + float(kl.detach())
        if terms.activity:
            ranks = [
                activity.sum(-1).reshape(len(activity), -1).mean(1).cpu()
                for activity in terms.activity
            ]
            values["effective_rank"] = float(torch.cat(ranks).mean())
    return values


class BayesianCallback(TrainerCallback):
    """Gives a Bayesian adapter under `transformers.Trainer` (or TRL) what its ELBO needs.

    It counts N (examples, or label tokens for a language model), drives the warm-up of the KL
    weights, and adds `kl_global`, `kl_local` and `effective_rank` to the logs.

    Args:
        num_observations: N, if it should not be counted (needed for data sets without a length).
    """

    def __init__(self, num_observations: int | None = None) -> None:
        self.num_observations = num_observations

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        elbo = elbo_of(model)
        if args.n_gpu > 1:
            raise BaraError(
                "torch.nn.DataParallel runs the model in several threads, where the KL of a step "
                "cannot be told apart. Start one process per GPU instead (torchrun, accelerate)."
            )
        n = self.num_observations
        if n is None:
            n = count_observations(kwargs["train_dataloader"], model)
        for name, config in elbo.configs.items():
            if config.num_observations not in (None, n):
                warnings.warn(
                    f"Adapter {name!r} was configured with num_observations="
                    f"{config.num_observations}, but the training data has {n}; using {n}. Pass "
                    "BayesianCallback(num_observations=...) to set another value.",
                    stacklevel=2,
                )
            config.num_observations = n
        if state.max_steps > 0:
            _set_by_steps(model, elbo, state.max_steps)
        self._set_progress(elbo, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._set_progress(elbo_of(kwargs["model"]), state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs:
            return
        terms = kl_terms(kwargs["model"])
        logs.update(terms)
        if state.log_history:
            state.log_history[-1].update(terms)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        elbo_of(kwargs["model"]).progress = None

    @staticmethod
    def _set_progress(elbo: Elbo, state: TrainerState) -> None:
        if state.max_steps > 0:
            elbo.progress = min(1.0, state.global_step / state.max_steps)


def count_observations(dataloader: DataLoader[Any], model: nn.Module) -> int:
    """N of a training set: its examples, or for per-token labels the labels that count.

    Raises:
        BaraError: the data set has no length.
    """
    dataset = getattr(dataloader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__"):
        raise BaraError(
            "The training data has no length, so N cannot be counted: pass "
            "bara.BayesianCallback(num_observations=...)."
        )
    first: Any = next(iter(dataloader), {})
    labels = first.get("labels") if hasattr(first, "get") else None
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return len(dataset)
    shift = predicts_next_token(adapted_root(model))
    # one more pass over this process's batches
    count, rows = 0, 0
    for batch in dataloader:
        labels = batch["labels"][..., 1:] if shift else batch["labels"]
        count += int(labels.ne(-100).sum())
        rows += labels.shape[0]
    if PartialState().num_processes == 1:
        return count  # also where a row is packed with several examples
    return round(count * len(dataset) / rows)
