"""What a trainer has to tell the ELBO: N, the progress; and what it logs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from itertools import islice
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from bara.adapter.call_inputs import predicts_next_token
from bara.adapter.elbo import AttachedAdapter, Elbo, adapted_root, elbo_of
from bara.adapter.layer import adapted_layers
from bara.adapter.scaled_head import restore_head
from bara.errors import BaraError
from bara.posteriors.rank_space import wide
from bara.training.head import read_once, scale_head_of
from bara.training.kl_mixin import add_kl, calling_trainer, progress_of
from bara.training.loss import kl_terms, rank_terms


def set_progress(
    model: nn.Module,
    fraction: float,
    num_steps: int | None = None,
    learning_rate: float | None = None,
) -> None:
    """Tells a Bayesian adapter how far training is; `BayesianCallback` does this in a Trainer.

    Args:
        model: a model with a Bayesian adapter.
        fraction: optimiser steps done over optimiser steps in all, in [0, 1]: for the KL's warm-up.
        num_steps: optimiser steps in all: defaults that depend on them are adjusted (BaRA's noise
            and weights of the KL); None leaves them.
        learning_rate: Adam's, before a schedule changes it: below 1e-3 steps count for less in
            these defaults; None counts them whole.

    Raises:
        BaraError: the fraction is outside [0, 1], num_steps below 1, or learning_rate below 0.
    """
    if not 0 <= fraction <= 1:
        raise BaraError(f"set_progress: fraction must be in [0, 1], got {fraction!r}.")
    if num_steps is not None and num_steps < 1:
        raise BaraError(f"set_progress: num_steps must be at least 1, got {num_steps!r}.")
    if learning_rate is not None and learning_rate < 0:
        raise BaraError(f"set_progress: learning_rate must be at least 0, got {learning_rate!r}.")
    elbo = elbo_of(model)
    elbo.progress = fraction
    if num_steps is not None:
        _set_by_steps(model, elbo, num_steps, learning_rate)


def _set_by_steps(
    model: nn.Module, elbo: Elbo, num_steps: int, learning_rate: float | None
) -> None:
    """Adjusts the numbers of the adapters in training, and what starts by them."""
    for adapter in trained_adapters(model, elbo).values():
        before = copy.copy(adapter.resolved)
        adapter.resolved.set_by_steps(num_steps, learning_rate)
        if adapter.resolved != before:  # not in every step of a loop of one's own
            for _, posterior in adapter.layers.values():
                posterior.start_again()


def learning_rate_of(optimizer: Any) -> float | None:
    """The largest learning rate of an optimiser's groups, before a schedule changes it."""
    groups = getattr(optimizer, "param_groups", [])
    rates = [group.get("initial_lr", group.get("lr")) for group in groups]
    return max((float(rate) for rate in rates if rate is not None), default=None)


def trained_adapters(model: nn.Module, elbo: Elbo) -> dict[str, AttachedAdapter]:
    """The adapters of which something is in training, by name."""

    def in_training(name: str) -> bool:
        for _, layer, posterior in adapted_layers(model, name):
            parts = layer.lora_A[name], layer.lora_B[name], posterior
            if any(p.requires_grad for part in parts for p in part.parameters()):
                return True
        return False

    return {name: adapter for name, adapter in elbo.adapters.items() if in_training(name)}


def _mark_references(model: nn.Module, elbo: Elbo) -> None:
    trained = trained_adapters(model, elbo)
    for name, adapter in elbo.adapters.items():
        adapter.reference = name not in trained


def _widen(model: nn.Module, elbo: Elbo) -> None:
    """Has posteriors trained in float32: TRL makes all that is trained on a quantised model
    bfloat16, in which a step of a gate is lost."""
    for adapter in trained_adapters(model, elbo).values():
        for _, posterior in adapter.layers.values():
            for parameter in posterior.parameters():
                if type(parameter) is nn.Parameter:  # not sharded
                    parameter.data = wide(parameter.data)


STREAM_BATCHES = 20
"""Batches of a stream whose label tokens are counted."""


class BayesianCallback(TrainerCallback):
    """Gives a Bayesian adapter under `transformers.Trainer` (or TRL) what its ELBO needs.

    It counts N (examples, or label tokens for a language model), has a new head learn at a pace
    that suits its features (`bara.scale_head`), drives the warm-up of the KL weights, adds the KL
    to a loss that the trainer computes itself (label smoothing, a `compute_loss` of one's own,
    TRL's trainers), and `kl_global`, `kl_local`, `effective_rank`, `s_bar`, `effective_rank/q_proj`
    and so on to the logs, also to those of the trackers of `report_to`. Where several processes
    train together N is that of all of them, and the logs have the terms of the first one's last
    batch.

    Args:
        num_observations: N, if it should not be counted: for a stream that repeats a smaller data
            set.
    """

    def __init__(self, num_observations: int | None = None) -> None:
        self.num_observations = num_observations

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # before TRL asks for a reference's log-probabilities, and before there is an optimiser
        model: Any = kwargs.get("model")
        elbo = None if model is None else Elbo.of(model)
        if elbo is not None:
            _mark_references(model, elbo)
            _widen(model, elbo)

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
        _refuse_split_inputs(args, model)
        trainer = calling_trainer(self)
        _mark_references(model, elbo)
        if trainer is not None and trainer.model_wrapped is trainer.model:  # nobody has a copy yet
            _widen(model, elbo)
        n = self.num_observations
        if n is None:
            n = count_observations(kwargs["train_dataloader"], model, state.max_steps, args)
        for name, adapter in trained_adapters(model, elbo).items():
            given = adapter.config.num_observations
            if given not in (None, n):
                warnings.warn(
                    f"Adapter {name!r} was configured with num_observations={given}, but "
                    f"the training data has {n}; using {n}. Pass "
                    "BayesianCallback(num_observations=...) to set another value.",
                    stacklevel=2,
                )
            adapter.resolved.num_observations = n
        rate = learning_rate_of(kwargs.get("optimizer"))
        steps = state.max_steps if state.max_steps > 0 else None
        scale_head_of(model, kwargs.get("train_dataloader"), steps, rate)
        if steps is not None:
            _set_by_steps(model, elbo, steps, rate)
        if trainer is None:
            self._set_progress(elbo, state)
        else:
            add_kl(trainer)
            callbacks = trainer.callback_handler.callbacks
            callbacks.remove(self)  # those that report logs elsewhere come after what adds to them
            callbacks.insert(0, self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        elbo = elbo_of(kwargs["model"])
        if elbo.progress is not None:  # nobody sets it around the loss (`add_kl`)
            self._set_progress(elbo, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # a trainer whose loss leaves the KL out stops before its first step, not after
        elbo_of(kwargs["model"]).check_consumed()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs:
            return
        terms = kl_terms(kwargs["model"]) | rank_terms(kwargs["model"])
        logs.update(terms)
        if state.log_history:
            state.log_history[-1].update(terms)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        elbo_of(model).progress = None
        restore_head(model)

    @staticmethod
    def _set_progress(elbo: Elbo, state: TrainerState) -> None:
        if (progress := progress_of(state)) is not None:
            elbo.progress = progress


def count_observations(
    dataloader: DataLoader[Any], model: nn.Module, max_steps: int, args: TrainingArguments
) -> int:
    """N of a training set: its examples, or for per-token labels the labels that count.

    A stream, whose length nobody knows, counts as long as the part of it that training takes.

    Args:
        dataloader: the training's.
        model: what is trained.
        max_steps: optimiser steps in all.
        args: of the training.

    Raises:
        BaraError: there is no data set to count.
    """
    dataset = getattr(dataloader, "dataset", None)
    if dataset is None:
        raise BaraError(
            "The training data cannot be counted: pass bara.BayesianCallback(num_observations=...)."
        )
    if isinstance(dataset, IterableDataset) and read_once(dataset):
        raise BaraError(
            "The training data is a stream that can be read only once: looking at it to find N "
            "would take its first batches. Pass bara.BayesianCallback(num_observations=...)."
        )
    first: Any = next(iter(dataloader), {})
    labels = first.get("labels") if hasattr(first, "get") else None
    per_token = isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point()
    if not hasattr(dataset, "__len__"):
        return _count_stream(dataloader, model, max_steps, args, per_token)
    if not per_token:
        return len(dataset)
    state = PartialState()
    if state.num_processes == 1:
        return _count_labels(dataloader, model)[0]
    # not its own loader, which fills the last batch with rows that others have too
    part = range(state.process_index, len(dataset), state.num_processes)
    own = DataLoader(Subset(dataset, part), args.train_batch_size, collate_fn=dataloader.collate_fn)
    return sum(gather_object([_count_labels(own, model)[0]]))


def _count_labels(batches: Iterable[Any], model: nn.Module) -> tuple[int, int]:
    """Label tokens that count, and rows, of some batches."""
    shift = predicts_next_token(adapted_root(model))
    count, rows = 0, 0
    for batch in batches:
        labels = batch["labels"][..., 1:] if shift else batch["labels"]
        count += int(labels.ne(-100).sum())
        rows += labels.shape[0]
    return count, rows


def _count_stream(
    dataloader: DataLoader[Any],
    model: nn.Module,
    max_steps: int,
    args: TrainingArguments,
    per_token: bool,
) -> int:
    """Examples that `max_steps` steps take, or their label tokens by those of the first batches."""
    rows = max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    n = rows
    if per_token:
        counted = gather_object([_count_labels(islice(dataloader, STREAM_BATCHES), model)])
        n = round(rows * sum(count for count, _ in counted) / sum(seen for _, seen in counted))
    what = "label tokens" if per_token else "examples"
    warnings.warn(
        f"The training data has no length, so N is what {max_steps} steps take: {n} {what}. If "
        "the stream repeats a smaller data set, pass its size: "
        "bara.BayesianCallback(num_observations=...).",
        stacklevel=2,
    )
    return n


def _refuse_split_inputs(args: TrainingArguments, model: nn.Module) -> None:
    """Refuses what would give the processes of one input draws that differ, or parts of weights."""
    parallel = args.parallelism_config
    sizes = [getattr(parallel, f"{kind}_size", 1) for kind in ("tp", "cp", "sp")]
    if max(getattr(adapted_root(model), "_tp_size", None) or 1, *sizes) > 1:
        raise BaraError(
            "Tensor, context and sequence parallelism share an input between processes, and each "
            "process draws noise of its own: train with DDP or FSDP2 (fully_shard)."
        )
    if is_deepspeed_zero3_enabled():
        raise BaraError(
            "DeepSpeed ZeRO-3 takes a layer's weights away as soon as it has been called, and a "
            "posterior reads them: use ZeRO-1 or 2, DDP or FSDP2 (fully_shard)."
        )
