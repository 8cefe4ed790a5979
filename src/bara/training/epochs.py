"""Epochs by early stopping: the best is found on held-out data, and can be stopped at again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
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
            self._weights = _trained(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].load_state_dict(self._weights, strict=False)
        self.epochs.append(self._epoch)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained, in the units of state dicts: a head may be in others meanwhile."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {n: t.clone() for n, t in model.state_dict().items() if n in names}


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
