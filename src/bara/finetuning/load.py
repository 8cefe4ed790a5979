"""Base models and saved adapters: loaded only after checking that nothing would be ignored."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_model
from transformers import AutoConfig, AutoModel

from bara.adapter.layer import renamed_key
from bara.cards.adapter_files import (
    CONFIG_FILE,
    MEND,
    MODEL_FILE,
    PROCESSOR_FILE,
    RECIPE_FILE,
    TASK_FILE,
    TOKENIZER_FILE,
    check_config,
    read_shapes,
)
from bara.data.images import ImageTask
from bara.draws.draws import attach_draws
from bara.errors import BaraError, first_line
from bara.finetuning.task_inputs import load_task
from bara.language.tasks import Task, is_multiple_choice
from bara.methods.ensemble import EnsembleDraws, member_name
from bara.methods.probabilistic_peft import PveraDraws, PveraTrainer
from bara.methods.recipe import TrainRecipe
from bara.methods.table import parse_method
from bara.methods.weight_draws import WeightDraws
from bara.models.base import auto_class, load_base, load_processor, load_tokenizer
from bara.models.sentence import SentenceClassifier
from bara.prediction.temperature import load_temperature
from bara.schema import read_json, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TRUST = "BARA_TRUST_REMOTE_CODE"
"""Set in the environment, a saved recipe may ask for code that is not installed here."""


def load_adapter(
    path: str | Path,
    *,
    base_model: str | PreTrainedModel | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any, Task]:
    """Load what `bara.finetuning.finetune.finetune` saved, in evaluation mode.

    Args:
        path: the adapter's folder.
        base_model: folder or hub name of the base model, if it is not where it was in training; or
            the model that `load_base_of` gave, which the adapter is put on.
        device: where to put the model; a GPU if there is one.

    Returns:
        The model (a `PeftModel`, or a transformers model after full fine-tuning), which
        `bara.predict` draws from as its method does; its tokeniser, or its image processor; and the
        task with its columns and label names.

    Raises:
        BaraError: something is missing or damaged, the adapter does not fit the base model, or its
            recipe asks for code of the base model's repository (see SECURITY.md).
    """
    folder = Path(path)
    _require_adapter(folder)
    recipe = TrainRecipe.load(folder / RECIPE_FILE)
    method, tempered = parse_method(recipe.method)
    model: Any
    task: Task
    if method.config is None:
        model, tokenizer, task = _load_model(folder)
    else:
        if base_model is None or isinstance(base_model, str):
            base_model = load_base_of(folder, base_model=base_model)
        model, tokenizer, task = _load_peft(folder, base_model)
    if method.ensemble:
        _load_members(model, folder, method.own_options(recipe.method_options).num_members)
    if issubclass(method.trainer, PveraTrainer):
        attach_draws(model, PveraDraws(model))
    if method.trainer.weight_noise:
        attach_draws(model, WeightDraws.load(model, folder))
    if tempered or is_multiple_choice(task):
        load_temperature(model, folder)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer, task


def load_base_of(path: str | Path, *, base_model: str | None = None) -> PreTrainedModel:
    """The base model of an adapter, as the adapter's task and recipe want it, without the adapter.

    Raises:
        BaraError: as `load_adapter`.
    """
    folder = Path(path)
    recipe = TrainRecipe.load(folder / RECIPE_FILE)
    _refuse_foreign_code(recipe.model_options, folder)
    name = base_model or read_config(folder).base_model_name_or_path
    if not name:
        raise BaraError(f"{folder / CONFIG_FILE} names no base model; give it with --base-model")
    method, _ = parse_method(recipe.method)
    task = load_task(folder)
    base, _ = load_base(name, task, recipe.model_options, mean_pooled=method.mean_pooled)
    return base


def _refuse_foreign_code(options: Mapping[str, Any], folder: Path) -> None:
    """Whoever made the folder wrote the options; whoever loads it has to ask for code to run."""
    attention = str(options.get("attn_implementation", ""))  # with a slash a kernel from the hub
    asked = [name for name in ("trust_remote_code", "use_kernels") if options.get(name)]
    asked += ["attn_implementation"] if "/" in attention else []
    if asked and not os.environ.get(TRUST):
        raise BaraError(
            f"{folder / RECIPE_FILE} asks to run code of the base model's or another repository "
            f"(model_options.{asked[0]}); where you trust it, set {TRUST}=1 in the environment"
        )


def read_task(path: str | Path) -> Task:
    """What an adapter was trained for, without loading it.

    Raises:
        BaraError: this is no adapter's folder, or its task cannot be read.
    """
    _require_adapter(Path(path))
    return load_task(Path(path))


def _require_adapter(folder: Path) -> None:
    if (folder / RECIPE_FILE).is_file():
        return
    read_config(folder)  # says so if this is no adapter at all
    if not (folder / TASK_FILE).is_file():
        raise BaraError(
            f"{folder} was saved by PEFT or a trainer, without the recipe and the task that `bara "
            "train` writes beside an adapter: load it with peft.PeftModel.from_pretrained (after "
            "import bara) and go on in Python (bara.generate, bara.predict, bara.prune, "
            "bara.export_lora, ...)"
        )


def _load_peft(folder: Path, base: PreTrainedModel) -> tuple[PeftModel, Any, Task]:
    config, task = read_config(folder), load_task(folder)
    tokenizer = _load_reader(folder, base, task)
    return attach_adapter(base, folder, config, str(base.name_or_path)), tokenizer, task


def attach_adapter(base: Any, folder: Path, config: PeftConfig, name: str) -> PeftModel:
    """The base model with the adapter of a folder, all of it and nothing else.

    Args:
        base: the base model.
        folder: the adapter's.
        config: what `read_config` made of it.
        name: of the base model, for messages.

    Raises:
        BaraError: the tensors are missing, damaged or of another base model.
    """
    saved_shapes = {renamed_key(key): shape for key, shape in read_shapes(folder).items()}
    with warnings.catch_warnings():
        # PEFT warns about what it skipped; the comparison below refuses it.
        warnings.simplefilter("ignore")
        try:
            model = PeftModel.from_pretrained(
                base, str(folder), config=config, ignore_mismatched_sizes=True
            )
        except (ValueError, RuntimeError, KeyError) as error:
            raise BaraError(
                f"the adapter {folder} does not fit the base model {name!r}: {first_line(error)}"
            ) from error
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    # PEFT 0.20 leaves an adapter's name in front of what lies deep in a posterior, as 0.1 did
    expected = {renamed_key(key): tuple(tensor.shape) for key, tensor in tensors.items()}
    _refuse_mismatch(saved_shapes, expected, folder, name)
    return model


def _load_members(model: PeftModel, folder: Path, num_members: int) -> None:
    """Loads the further members of an ensemble from their folders."""
    for index in range(1, num_members):
        member = folder / member_name(index)
        read_shapes(member)
        read_config(member)
        try:
            model.load_adapter(str(member), member_name(index))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise BaraError(
                f"member {index} of the ensemble {folder} is missing or damaged: "
                f"{first_line(error)}"
            ) from error
    attach_draws(model, EnsembleDraws(model, num_members))


def _load_model(folder: Path) -> tuple[PreTrainedModel, Any, Task]:
    """The result of full fine-tuning."""
    task = load_task(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder))
        if isinstance(task, ImageTask):
            model = _renamed(auto_class(task), folder)
        elif SentenceClassifier.__name__ in (config.architectures or ()):
            model = SentenceClassifier(AutoModel.from_config(config))
            load_model(model, folder / MODEL_FILE)
        else:
            model = auto_class(task).from_config(config)
            load_model(model, folder / MODEL_FILE)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BaraError(
            f"the model in {folder} is incomplete or damaged ({first_line(error)}); train again"
        ) from error
    model.to(config.dtype)
    return model, _load_reader(folder, model, task), task


def _renamed(auto: Any, folder: Path) -> PreTrainedModel:
    """A model whose tensors transformers saves under other names than they have in memory."""
    model, info = auto.from_pretrained(str(folder), output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]}")
    return cast("PreTrainedModel", model)


def _load_reader(folder: Path, model: PreTrainedModel, task: Task) -> Any:
    """The folder's tokeniser or image processor."""
    if not isinstance(task, ImageTask):
        return _load_tokenizer(folder, model)
    if not (folder / PROCESSOR_FILE).is_file():
        raise BaraError(f"{folder} has no {PROCESSOR_FILE}; {MEND}")
    return load_processor(str(folder))


def _load_tokenizer(folder: Path, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokeniser of the folder, unless part of it is gone: every word could be unknown."""
    if not (folder / TOKENIZER_FILE).is_file():
        raise BaraError(f"{folder} has no {TOKENIZER_FILE}; {MEND}")
    tokenizer = load_tokenizer(str(folder), model)
    vocabulary = dict(tokenizer.vocab_files_names)
    whole = vocabulary.pop("tokenizer_file", None)
    files = list(vocabulary.values())
    if not (whole and (folder / whole).is_file()) and not (
        files and all((folder / name).is_file() for name in files)
    ):
        raise BaraError(f"{folder} has no {whole or ' and '.join(files)}; {MEND}")
    return tokenizer


def read_config(folder: Path) -> PeftConfig:
    """The adapter's configuration.

    Raises:
        BaraError: the folder or the file is missing, or the file is damaged or of a later version;
            the message names the field.
    """
    if not folder.is_dir():
        raise BaraError(f"there is no adapter folder {folder}; `bara train` makes one")
    path = folder / CONFIG_FILE
    if not path.is_file():
        hint = ""
        if (folder / "draw-0" / CONFIG_FILE).is_file():
            hint = f"; it holds an ensemble: give one of its draws, {folder / 'draw-0'}, or the "
            hint += "adapter it was exported from"
        elif (folder / "config.json").is_file():
            hint = "; it holds a whole model: give the adapter that it was exported from"
        raise BaraError(f"{folder} is not an adapter: it has no {CONFIG_FILE}{hint}")
    named = read_json(path, dict[str, Any], MEND).get("peft_type")
    known: Mapping[Any, type[PeftConfig]] = PEFT_TYPE_TO_CONFIG_MAPPING
    config = known.get(named) if isinstance(named, str) else None
    if config is None:
        raise BaraError(f"{path}: peft_type names no method known here, {shown(named)}; {MEND}")
    check_config(path, config)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BaraError(
            f"{path} is damaged or of another version ({first_line(error)}); {MEND}"
        ) from error


def _refuse_mismatch(
    saved: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    folder: Path,
    base: str,
) -> None:
    problem = None
    if missing := sorted(expected.keys() - saved.keys()):
        problem = f"{len(missing)} tensors are not in it (first: {missing[0]})"
    elif extra := sorted(saved.keys() - expected.keys()):
        problem = f"{len(extra)} of its tensors have no place there (first: {extra[0]})"
    elif wrong := sorted(key for key in saved if saved[key] != expected[key]):
        key = wrong[0]
        problem = f"{key} has the shape {saved[key]}, where {expected[key]} is needed"
    if problem:
        raise BaraError(
            f"the adapter {folder} does not fit the base model {base!r}: {problem}; "
            "give the model it was trained on with --base-model"
        )
