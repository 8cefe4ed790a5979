"""Writing an adapter's folder, all of it or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from bara.cards.adapter_files import CALIBRATIONS, LOADED_FILES, RECIPE_FILE, TASK_FILE
from bara.draws.draws import draw_source
from bara.errors import BaraError
from bara.files import atomic_directory
from bara.language.tasks import Task
from bara.methods.recipe import TrainRecipe
from bara.methods.weight_draws import WeightDraws
from bara.prediction.temperature import save_temperature

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OF_EARLIER_WEIGHTS = (*CALIBRATIONS, *LOADED_FILES)
"""Files of an earlier run that this one does not write over: what was calibrated on its weights,
and its adapter where a whole model comes, which transformers would load instead."""


def save_adapter(
    folder: str | Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    recipe: TrainRecipe,
    beside: Callable[[Path], object] | None = None,
) -> None:
    """Write everything that `bara.load_adapter` reads, all of it or nothing.

    Args:
        folder: where.
        model, tokenizer, task, recipe: what it reads.
        beside: writes further files into the folder before it takes its place.

    Raises:
        BaraError: a weight is not finite, or the folder cannot be written.
    """
    for name, tensor in _trained_weights(model):
        if not tensor.isfinite().all():
            raise BaraError(
                f"the weights of {name} are not finite after training, so the adapter was not "
                "saved; lower the learning rate (--learning-rate)"
            )
    with atomic_directory(folder, drop=OF_EARLIER_WEIGHTS) as temporary:
        options: dict[str, Any] = (
            {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
        )
        model.save_pretrained(str(temporary), **options)
        source = draw_source(model)
        if isinstance(source, WeightDraws):
            source.save(temporary)
        save_temperature(model, temporary)
        tokenizer.save_pretrained(str(temporary))
        task.save(temporary / TASK_FILE)
        (temporary / RECIPE_FILE).write_text(recipe.to_yaml(), "utf-8")
        if beside is not None:
            beside(temporary)


def _trained_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(model, PeftModel):
        yield from model.named_parameters()
        return
    for adapter in model.peft_config:
        yield from get_peft_model_state_dict(
            model, adapter_name=adapter, save_embedding_layers=False
        ).items()
