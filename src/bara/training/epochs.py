"""Epochs by early stopping: the best is found on held-out data, and can be stopped at again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_NEARLY = 1e-6
"""Epochs that a count of steps over steps in an epoch may be off by."""


class BestEpoch(TrainerCallback):
    """Puts back the trained weights of the epoch with the least held-out loss.

    The `Trainer` has to evaluate after every epoch. The loss is its own: that of the mean weights.

    Attributes:
        epochs: the best epoch of every training run, in their order.
    """

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._least, self._epoch = math.inf, 0.0
        self._weights: dict[str, Tensor] = {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loss = kwargs["metrics"]["eval_loss"]
        if loss < self._least:
            self._least, self._epoch = loss, float(state.epoch or 0)
            trained = kwargs["model"].named_parameters()
            self._weights = {n: p.detach().clone() for n, p in trained if p.requires_grad}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            if name in self._weights:
                parameter.data.copy_(self._weights[name])
        self.epochs.append(self._epoch)


class StopAfter(TrainerCallback):
    """Ends training runs early, in the schedule that they have for all of their epochs.

    Args:
        epochs: after how many to end, for every training run in its order.
    """

    def __init__(self, epochs: Sequence[float]) -> None:
        self.epochs = list(epochs)
        self._run = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._run += 1

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (state.epoch or 0) >= self.epochs[self._run] - _NEARLY:
            control.should_training_stop = True
