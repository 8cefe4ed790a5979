"""AdaLoRA's budget schedule (arXiv 2303.10512), which PEFT leaves to the training loop."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bara.errors import BaraError
from bara.training.trainer import AdapterTrainer

START, END = 0.1, 0.5
"""Part of training before the budget starts to fall, and part of it after it has fallen."""
UNKNOWN = 10**9
"""Number of steps until the callback knows better; the configuration wants one."""


def adalora_options(options: dict[str, Any], _: Any) -> dict[str, Any]:
    """Options of `peft.AdaLoraConfig`: `r` is the rank it starts with, 1.5 times the final mean."""
    options = dict(options)
    rank = options.pop("r")
    return {
        "init_r": rank,
        "target_r": max(1, round(rank / 1.5)),
        "total_step": UNKNOWN,
        **options,
    }


class AdaloraTrainer(AdapterTrainer):
    """Tells AdaLoRA how long training is, and lets it share out its budget after every step.

    PEFT saves the ranks that are left, but neither those cut off, which may come back, nor what
    every rank has mattered so far: no training can go on from its checkpoints.
    """

    resumes = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_Budget())


class _Budget(TrainerCallback):
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        tuner = kwargs["model"].base_model
        config = tuner.peft_config[tuner.trainable_adapter_name]
        config.total_step = state.max_steps
        if not (config.tinit or config.tfinal):
            config.tinit = int(START * state.max_steps)
            config.tfinal = int(END * state.max_steps)
        if config.tinit >= state.max_steps - config.tfinal:
            raise BaraError(
                f"method adalora: tinit = {config.tinit} and tfinal = {config.tfinal} leave none "
                f"of the {state.max_steps} steps to reduce the rank"
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # before the gradients, which say what matters, are gone
        kwargs["model"].base_model.update_and_allocate(state.global_step)
