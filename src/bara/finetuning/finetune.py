"""Fine-tuning a text model with an adapter: from a recipe and a table to a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from bara.data.images import IMAGE_TASK, ImageTask, image_table
from bara.data.question_task import QuestionTask
from bara.data.tables import load_table
from bara.data.tag_task import TagTask
from bara.data.tasks import TABLE_TASKS
from bara.data.text_task import LABEL_COLUMNS, TextTask
from bara.draws.draws import attach_draws
from bara.errors import BaraError, first_line
from bara.finetuning.certified_prior import prepare
from bara.finetuning.checkpoints import CHECKPOINTS, check_output, only_run, prepare_checkpoints
from bara.finetuning.save import save_adapter
from bara.finetuning.task_inputs import predict_table, read_table, text_task
from bara.language.choice_loss import ChoiceCollator, base_temperature, tokenise_choices
from bara.language.prompts import context
from bara.language.tasks import LANGUAGE_TASKS, LanguageTask, Task, is_multiple_choice
from bara.methods.ensemble import EnsembleDraws, member_name
from bara.methods.recipe import TrainRecipe
from bara.methods.table import Method, check_recipe, parse_method
from bara.models.base import load_base, load_processor, load_tokenizer, require_modules
from bara.posteriors.certified import CertifiedConfig
from bara.posteriors.config import BayesianConfig
from bara.prediction.batches import pad_rows
from bara.prediction.likelihood import gaussian_nll
from bara.prediction.temperature import fit_temperature, set_temperature
from bara.schema import SEEDS
from bara.training.callback import BayesianCallback
from bara.training.loss import elbo_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MEMBER_SEEDS = 1000
"""Distance of the seeds of an ensemble's members, so that ensembles of seeds 0, 1, ... differ."""

ATTENTION_PROJECTIONS = (
    *("query", "key", "value"),
    *("q_proj", "k_proj", "v_proj"),
    *("q_lin", "k_lin", "v_lin"),
    *("query_proj", "key_proj", "value_proj"),
    *("query_key_value", "c_attn", "qkv_proj", "Wqkv", "q", "k", "v"),
)
"""Names of the query, key and value projections in the models of `transformers`."""


def finetune(
    recipe: TrainRecipe,
    train: Dataset | None = None,
    validation: Dataset | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Iterable[TrainerCallback] = (),
) -> Path:
    """Train an adapter and save it with its tokeniser, task and recipe.

    Checkpoints go to `OUTPUT/checkpoints`. The adapter itself replaces an earlier one only when it
    is complete and its weights are finite.

    Args:
        recipe: everything that decides the run.
        train, validation: tables to use instead of those that the recipe names.
        resume: go on from the newest complete checkpoint.
        overwrite: train anew where there is an adapter or a checkpoint already.
        callbacks: further callbacks for the `Trainer`.

    Returns:
        The adapter's folder.

    Raises:
        BaraError: an option, the data or the model cannot be used, another process trains in the
            folder, the loss is not finite, or saving failed. An earlier adapter and the last
            checkpoint are then as they were.
    """
    check_recipe(recipe)
    output = Path(recipe.output)
    if output.exists() and not output.is_dir():
        raise BaraError(f"{output} is a file; give a folder with --output")
    with only_run(output):
        check_output(output, recipe, resume=resume, overwrite=overwrite)
        _finetune(recipe, train, validation, resume=resume, callbacks=callbacks)
    return output


def _finetune(
    recipe: TrainRecipe,
    train: Dataset | None,
    validation: Dataset | None,
    *,
    resume: bool,
    callbacks: Iterable[TrainerCallback],
) -> None:
    method, tempered = parse_method(recipe.method)
    output = Path(recipe.output)
    train = read_train(recipe) if train is None else train
    if tempered and validation is None and not recipe.validation:
        raise BaraError(f"method {recipe.method} needs held-out data: give it with --validation")
    task = task_of(recipe, train)
    method.check_task(task.task)
    if validation is None and recipe.validation:
        validation = read_table(recipe.validation, task, split=recipe.validation_split)
    set_seed(recipe.seed)
    model, tokenizer = build_model(recipe, method, task)
    if not isinstance(task, ImageTask):
        room = min(tokenizer.model_max_length, context(model))
        task = replace(task, max_length=min(task.max_length, room))
    if method.config is CertifiedConfig:
        learn = None if resume else partial(finetune, overwrite=True, callbacks=callbacks)
        prepare(model, recipe, train, text_task(task, "certify"), learn)
    inputs, collator = _training_inputs(model, tokenizer, task)
    data = {
        "train_dataset": inputs(train),
        "eval_dataset": None if validation is None else inputs(validation),
        "data_collator": collator,
        "processing_class": tokenizer,
        "callbacks": list(callbacks),
    }
    if is_multiple_choice(task):
        arguments = _training_arguments(recipe, evaluate=False)
        if next(model.parameters()).device.type == "cpu":
            model.to(arguments.device)  # where the Trainer will move it
        with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
            temperature = base_temperature(model, tokenizer, train, task, recipe.seed)
        set_temperature(model, temperature)
    checkpoint = prepare_checkpoints(output / CHECKPOINTS, recipe, task, resume=resume)
    if method.ensemble:
        _train_members(model, method, recipe, task, data)
    elif method.fit is not None:
        own = method.own_options(recipe.method_options)
        method.fit(model, text_task(task, "train"), train, recipe, own, list(callbacks))
    else:
        train_model(model, method, recipe, data, task.task, checkpoint)
    if tempered:
        assert validation is not None
        set_temperature(model, 1.0)
        held_out = predict_table(model, tokenizer, task, validation)
        set_temperature(model, fit_temperature(held_out))
    save_adapter(output, model, tokenizer, task, recipe)


def _training_inputs(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Task
) -> tuple[Callable[[Dataset], Dataset], Any]:
    """What makes the training's rows of a table, and its batches of the rows."""
    if is_multiple_choice(task):
        attention = getattr(model.config, "_attn_implementation", None)
        if attention not in ("sdpa", "eager"):
            raise BaraError(
                f"multiple choice needs attention that takes a mask for every position: set "
                f"model_options.attn_implementation to sdpa, not {attention}"
            )
        window = getattr(model.config, "sliding_window", None)
        rows = partial(tokenise_choices, tokenizer=tokenizer, task=task, window=window)
        return rows, ChoiceCollator(tokenizer)
    inputs = partial(task.inputs, tokenizer=tokenizer)
    if isinstance(task, ImageTask):
        return inputs, DefaultDataCollator()
    if isinstance(task, QuestionTask):
        # on the right, so that the answers stay where they are
        collator = partial(pad_rows, pad_token_id=tokenizer.pad_token_id or 0)
        return lambda table: inputs(table).dataset(), collator
    if isinstance(task, TagTask):
        return inputs, DataCollatorForTokenClassification(tokenizer)
    if isinstance(task, LanguageTask):
        return inputs, DataCollatorForSeq2Seq(tokenizer)
    return inputs, DataCollatorWithPadding(tokenizer)


def train_model(
    model: nn.Module,
    method: Method,
    recipe: TrainRecipe,
    data: dict[str, Any],
    task: str = "classification",
    checkpoint: Path | None = None,
) -> None:
    """Trains a model in place, and does what the method does after training.

    Args:
        model: with its new adapter.
        method: the recipe's.
        recipe: the options of the method and of training.
        data: arguments of the `Trainer`, `eval_dataset` among them.
        task: for `regression` the model has two outputs, see `gaussian_nll`.
        checkpoint: where to go on from.

    Raises:
        BaraError: an option cannot be used, the loss is not finite, or memory is short.
    """
    arguments = _training_arguments(recipe, evaluate=data["eval_dataset"] is not None)
    try:
        trainer = method.trainer(
            model=model,
            options=method.own_options(recipe.method_options),
            args=arguments,
            compute_loss_func=elbo_loss(model, gaussian_nll) if task == "regression" else None,
            **data,
        )
    except BaraError:
        raise
    except (ValueError, TypeError, RuntimeError, ImportError) as error:  # of some other option
        raise BaraError(f"training: {first_line(error)}") from error
    if isinstance(model, PeftModel) and isinstance(model.active_peft_config, BayesianConfig):
        trainer.add_callback(BayesianCallback())
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise BaraError(
            "out of memory; lower the batch size (--batch-size) or the longest input (--max-length)"
        ) from error
    trainer.finish()


def _train_members(
    model: PeftModel, method: Method, recipe: TrainRecipe, task: Task, data: dict[str, Any]
) -> None:
    """Trains the members of an ensemble one after the other, as adapters of one base model."""
    num_members = method.own_options(recipe.method_options).num_members
    training = {**recipe.training, "save_strategy": "no"}  # a member is no state to go on from
    for index in range(num_members):
        seed = (recipe.seed + index * MEMBER_SEEDS) % SEEDS
        member = replace(recipe, seed=seed, training=training)
        if index:
            set_seed(member.seed)
            model.add_adapter(member_name(index), model.peft_config[member_name(0)])
            model.set_adapter(member_name(index))
        train_model(model, method, member, data, task.task)
    attach_draws(model, EnsembleDraws(model, num_members))


def read_train(recipe: TrainRecipe) -> Dataset:
    """The training table that a recipe names.

    Raises:
        BaraError: it names none, or the table cannot be read.
    """
    if not recipe.data:
        raise BaraError("which data? Give a file or a hub data set with --data")
    if recipe.task == IMAGE_TASK:
        return image_table(recipe.data, split=recipe.split)
    texts: tuple[str | None, ...] = (recipe.text_column, recipe.text_pair_column)
    if recipe.task == "multi-label":  # names, even where all look like numbers
        texts += (recipe.label_column, *LABEL_COLUMNS)
    return load_table(recipe.data, split=recipe.split, text_columns=texts)


def task_of(recipe: TrainRecipe, train: Dataset) -> Task:
    """What a recipe learns from a table.

    Raises:
        BaraError: see `TextTask.infer`.
    """
    if recipe.task == IMAGE_TASK:
        return ImageTask.infer(train, label_column=recipe.label_column)
    if recipe.task in LANGUAGE_TASKS:
        return LanguageTask(
            recipe.task,  # type: ignore[arg-type]  # checked above
            max_length=recipe.max_length,
            scoring=recipe.scoring,  # type: ignore[arg-type]  # checked there
        )
    described = TABLE_TASKS.get(recipe.task or "", TextTask)
    options: dict[str, Any] = {
        "text_column": recipe.text_column,
        "text_pair_column": recipe.text_pair_column,
        "label_column": recipe.label_column,
        "max_length": recipe.max_length,
    }
    if described is TextTask:
        options["task"] = recipe.task  # checked there
    if described is QuestionTask:
        options["stride"] = recipe.stride
        options["max_answer_length"] = recipe.max_answer_length
    return described.infer(train, **options)


def build_model(recipe: TrainRecipe, method: Method, task: Task) -> tuple[Any, Any]:
    """The base model with a new adapter (or ready for full fine-tuning), and its tokeniser or image
    processor.

    Args:
        recipe: the model and the options.
        method: the recipe's.
        task: decides the head.

    Raises:
        BaraError: the model cannot be loaded, or the method's options do not fit it.
    """
    base, new_modules = load_base(
        _absolute(recipe.model), task, recipe.model_options, mean_pooled=method.mean_pooled
    )
    tokenizer: Any
    if isinstance(task, ImageTask):
        tokenizer = load_processor(recipe.model)
    else:
        tokenizer = load_tokenizer(recipe.model, base, words=isinstance(task, TagTask))
    if method.config is None:
        return base, tokenizer
    options = method.config_options(recipe.method_options)
    options["task_type"] = task.names.peft
    if options.get("target_modules") is None:
        options["target_modules"] = attention_projections(base)
    # What the checkpoint lacks is random: it has to come back with the adapter.
    saved = [*(options.get("modules_to_save") or []), *new_modules]
    options["modules_to_save"] = saved or None
    try:
        model = get_peft_model(base, method.config(**options))
    except BaraError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise BaraError(f"method {recipe.method}: {first_line(error)}") from error
    require_modules(model, recipe.method_options)
    return model, tokenizer


def attention_projections(model: nn.Module) -> list[str] | str:
    """Names of the attention's query, key and value projections; `all-linear` if none is known, and
    in a network without linear layers before its head the convolutions that are not grouped."""
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if known := [name for name in ATTENTION_PROJECTIONS if name in leaves]:
        return known
    backbone: Any = getattr(model, "base_model", model)
    if any(isinstance(module, nn.Linear) for module in backbone.modules()):
        return "all-linear"
    convolutions = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1
    ]
    return convolutions or "all-linear"


def _training_arguments(recipe: TrainRecipe, *, evaluate: bool) -> TrainingArguments:
    checkpoints = Path(recipe.output) / CHECKPOINTS
    options = {"eval_strategy": "epoch", **recipe.training}
    if recipe.task in ("multiple-choice", IMAGE_TASK):
        options["remove_unused_columns"] = False  # the loss, or what reads images, needs another
    if not evaluate:
        options["eval_strategy"] = "no"
    try:
        return TrainingArguments(
            output_dir=str(checkpoints), seed=recipe.seed, **{"disable_tqdm": True, **options}
        )
    except Exception as error:  # transformers raises many types for what it cannot use
        raise BaraError(f"training: {first_line(error)}") from error


def _absolute(model: str) -> str:
    """A folder's or a file's full path, so that the adapter finds its base model from anywhere."""
    return os.path.realpath(model) if Path(model).exists() else model
