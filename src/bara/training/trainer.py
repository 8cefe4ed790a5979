"""The `Trainer` of all methods."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from bara.errors import BaraError, first_line
from bara.language.choice_loss import choice_nll
from bara.prediction.temperature import get_temperature
from bara.training.kl_mixin import KLMixin
from bara.training.loss import elbo_loss

COMPLETE = "complete"
"""File that marks a checkpoint as whole: a process that is killed while saving leaves none."""


class AdapterTrainer(KLMixin, Trainer):
    """A `Trainer` that stops at a loss that is not finite, and whose checkpoints are whole.

    A method that trains in a way of its own, or does something after training, derives from it.

    Args:
        options: the method's own options.
        *args, **kwargs: those of `Trainer`.

    Attributes:
        weight_noise: whether `finish` attaches a `bara.methods.WeightDraws`.
        resumes: whether its checkpoints hold all that training goes on with.
    """

    weight_noise = False
    resumes = True

    def __init__(self, *args: Any, options: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = options
        self.add_callback(TrainingProgress())
        self.remove_callback(PrinterCallback)

    @property
    def trained(self) -> nn.Module:
        """The model, which `Trainer` declares optional."""
        assert self.model is not None
        return self.model

    def finish(self) -> None:
        """What a method does after training: it attaches its draws to the model."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, or for batches of `ChoiceCollator` that of the choices."""
        if "segments" not in inputs:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        read = {name: inputs[name] for name in ("input_ids", "position_ids", "attention_mask")}
        outputs = model(**read)

        def nll(outputs: Any, answers: Tensor) -> Tensor:
            return choice_nll(
                outputs.logits,
                inputs["input_ids"],
                inputs["segments"],
                answers,
                get_temperature(self.trained),
            )

        loss = elbo_loss(model, nll)(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step; see `Trainer.training_step`.

        Raises:
            BaraError: the loss is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise BaraError(
                f"the loss is {loss.item()} in step {self.state.global_step + 1}, so training "
                "stopped and nothing was saved over; lower the learning rate (--learning-rate)"
            )
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        others = {path.parent for path in folder.parent.glob(f"checkpoint-*/{COMPLETE}")} - {folder}
        try:
            super()._save_checkpoint(model, trial)
            (folder / COMPLETE).touch()
        except Exception as error:  # torch and safetensors have types of their own for full disks
            shutil.rmtree(folder, ignore_errors=True)
            then = "earlier ones are intact, so make room and go on with --resume"
            if not others:
                then = "there is no earlier one, so make room and start again"
            raise BaraError(
                f"cannot save the checkpoint {folder}: {first_line(error)}; {then}"
            ) from error


class TrainingProgress(TrainerCallback):
    """A progress bar with the loss, on standard error and only on a terminal."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            leave=None,  # not below the bar of a search
            disable=None,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs") or {}
        self.bar.set_postfix({key: logs[key] for key in ("loss", "eval_loss") if key in logs})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()
