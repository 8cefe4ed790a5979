"""Training one cell's model, and predicting with it: one interface for every kind of task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bara.adapter.elbo import Elbo
from bara.bench.spec import Cell, recipe_of
from bara.bench.tasks import Splits
from bara.data.examples import minilm_path
from bara.machine import fast_bfloat16
from bara.prediction.predict import predict
from bara.prediction.predictive import Predictive
from bara.ranks.effective_rank import EffectiveRank, effective_rank


def _smollm2_path() -> Path:
    from bara.models.gguf import smollm2_path

    return smollm2_path()


MODELS: dict[str, Callable[[], Path]] = {"minilm": minilm_path, "smollm2": _smollm2_path}
"""Models that come as packages, by name."""


@dataclass(frozen=True)
class Fitted:
    """A trained model with the way it takes tables.

    Attributes:
        model: in evaluation mode.
        parameters: number of parameters that were trained.
        predictor: the predictive distribution of a table, with or without labels; takes the options
            of `bara.predict`.
        inputs: from a table to the inputs of a forward pass, without labels where it can be.
    """

    model: nn.Module
    parameters: int
    predictor: Callable[..., Predictive]
    inputs: Callable[[Dataset], Any]

    def predict(self, table: Dataset, *, labels: bool = True, **options: Any) -> Predictive:
        """The predictive distribution for a table; `options` are those of `bara.predict`."""
        with self._precision():
            return self.predictor(table, labels=labels, progress=False, **options)

    def rank(self, table: Dataset) -> EffectiveRank | None:
        """The effective rank on a table; None for a model without a Bayesian adapter."""
        if Elbo.of(self.model) is None:
            return None
        with self._precision():
            return effective_rank(self.model, self.inputs(table), progress=False)

    def _precision(self) -> AbstractContextManager[Any]:
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16())


class ParameterCount(TrainerCallback):
    """Adds up the trainable parameters of every training run that it sees."""

    def __init__(self) -> None:
        self.total = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.total += sum(p.numel() for p in kwargs["model"].parameters() if p.requires_grad)


def fit(
    cell: Cell,
    splits: Splits,
    folder: Path,
    callbacks: Iterable[TrainerCallback] = (),
    evaluate: str = "no",
) -> Fitted:
    """Train a cell's model.

    Args:
        cell: what to train, and with which options.
        splits: the training examples, and the held-out ones for methods that fit something after
            training.
        folder: where the adapter goes.
        callbacks: further callbacks for the `Trainer`.
        evaluate: `epoch` for the held-out loss after every epoch.

    Raises:
        BaraError: the model, the method or the data cannot be used.
    """
    recipe = recipe_of(cell, folder, splits.recipe_task)
    recipe = replace(
        recipe,
        model=str(MODELS[cell.model]()) if cell.model in MODELS else cell.model,
        training={
            **recipe.training,
            "save_strategy": "no",
            "eval_strategy": evaluate,
            "bf16": fast_bfloat16(),
            "use_cpu": not torch.cuda.is_available(),
        },
    )
    count = ParameterCount()
    if splits.kind == "image":
        from bara.bench.images import finetune_images, image_inputs

        images = finetune_images(
            recipe, splits.train, splits.validation, callbacks=[count, *callbacks]
        )

        def predict_images(table: Dataset, labels: bool = True, **options: Any) -> Predictive:
            return predict(images, image_inputs(table, labels=labels), **options)

        return Fitted(images, count.total, predict_images, partial(image_inputs, labels=False))
    from bara.finetuning.finetune import finetune
    from bara.finetuning.load import load_adapter
    from bara.finetuning.task_inputs import predict_table

    finetune(recipe, splits.train, splits.validation, callbacks=[count, *callbacks])
    model, tokenizer, task = load_adapter(folder)

    def inputs(table: Dataset) -> Dataset:
        return task.inputs(table, tokenizer, labels=False)

    return Fitted(model, count.total, partial(predict_table, model, tokenizer, task), inputs)
