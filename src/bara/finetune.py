"""Fine-tuning a text model with an adapter: from a recipe and a table to a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from bara.configs import BayesianConfig
from bara.data import TextTask, first_line, load_table, tokenise
from bara.errors import BaraError
from bara.files import atomic_directory
from bara.language import LANGUAGE_TASKS, LanguageTask, tokenise_language
from bara.loading import (
    CONFIG_FILE,
    RECIPE_FILE,
    TASK_FILE,
    Task,
    load_base,
    load_tokenizer,
)
from bara.recipe import TrainRecipe, config_class
from bara.training import BayesianCallback, elbo_loss, gaussian_nll

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CHECKPOINTS = "checkpoints"
COMPLETE = "complete"
"""File that marks a checkpoint as whole: a process that is killed while saving leaves none."""

_TASK_TYPES = {TextTask: "SEQ_CLS", LanguageTask: "CAUSAL_LM"}

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
        BaraError: an option, the data or the model cannot be used, the loss is not finite, or
            saving failed. An earlier adapter and the last checkpoint are then as they were.
    """
    recipe.check()
    output = Path(recipe.output)
    _check_output(output, recipe, resume=resume, overwrite=overwrite)
    if train is None:
        if not recipe.data:
            raise BaraError("which data? Give a file or a hub data set with --data")
        train = load_table(recipe.data, split=recipe.split)
    if validation is None and recipe.validation:
        validation = load_table(recipe.validation, split=recipe.validation_split)
    task = _task(recipe, train)
    set_seed(recipe.seed)
    model, tokenizer = build_model(recipe, task)
    task = replace(task, max_length=min(task.max_length, _longest_input(model, tokenizer)))
    train_inputs = _inputs(train, tokenizer, task)
    validation_inputs = None if validation is None else _inputs(validation, tokenizer, task)
    language = isinstance(task, LanguageTask)
    trainer = AdapterTrainer(
        model=model,
        args=_training_arguments(recipe, output / CHECKPOINTS, evaluate=validation is not None),
        train_dataset=train_inputs,
        eval_dataset=validation_inputs,
        data_collator=(DataCollatorForSeq2Seq if language else DataCollatorWithPadding)(tokenizer),
        processing_class=tokenizer,
        callbacks=[TrainingProgress(), *callbacks],
        compute_loss_func=elbo_loss(model, gaussian_nll) if task.task == "regression" else None,
    )
    trainer.remove_callback(PrinterCallback)
    if isinstance(model.active_peft_config, BayesianConfig):
        trainer.add_callback(BayesianCallback())
    checkpoint = _prepare_checkpoints(output / CHECKPOINTS, recipe, resume=resume)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise BaraError(
            "out of memory; lower training.per_device_train_batch_size or max_length"
        ) from error
    save_adapter(output, model, tokenizer, task, recipe)
    return output


def _task(recipe: TrainRecipe, train: Dataset) -> Task:
    if recipe.task in LANGUAGE_TASKS:
        return LanguageTask(
            recipe.task,  # type: ignore[arg-type]  # checked above
            max_length=recipe.max_length,
            scoring=recipe.scoring,  # type: ignore[arg-type]  # checked there
        )
    return TextTask.infer(
        train,
        text_column=recipe.text_column,
        text_pair_column=recipe.text_pair_column,
        label_column=recipe.label_column,
        task=recipe.task,  # type: ignore[arg-type]  # checked there
        max_length=recipe.max_length,
    )


def _inputs(table: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task) -> Dataset:
    if isinstance(task, LanguageTask):
        return tokenise_language(table, tokenizer, task)
    return tokenise(table, tokenizer, task)


def build_model(recipe: TrainRecipe, task: Task) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model with a new adapter, and its tokeniser.

    Raises:
        BaraError: the model cannot be loaded, or the method's options do not fit it.
    """
    base, new_modules = load_base(_absolute(recipe.model), task, recipe.model_options)
    tokenizer = load_tokenizer(recipe.model, base)
    options = {**recipe.method_options, "task_type": _TASK_TYPES[type(task)]}
    if options.get("target_modules") is None:
        options["target_modules"] = attention_projections(base)
    # What the checkpoint lacks is random: it has to come back with the adapter.
    saved = [*(options.get("modules_to_save") or []), *new_modules]
    options["modules_to_save"] = saved or None
    try:
        return get_peft_model(base, config_class(recipe.method)(**options)), tokenizer
    except (ValueError, TypeError) as error:
        raise BaraError(f"method {recipe.method}: {first_line(error)}") from error


def attention_projections(model: nn.Module) -> list[str] | str:
    """Names of the attention's query, key and value projections; `all-linear` if none is known."""
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in ATTENTION_PROJECTIONS if name in leaves] or "all-linear"


def save_adapter(
    folder: str | Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    recipe: TrainRecipe,
) -> None:
    """Write everything that `bara.loading.load_adapter` reads, all of it or nothing.

    Raises:
        BaraError: a weight is not finite, or the folder cannot be written.
    """
    for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if not tensor.isfinite().all():
            raise BaraError(
                f"the weights of {name} are not finite after training, so the adapter was not "
                "saved; lower training.learning_rate"
            )
    with atomic_directory(folder) as temporary:
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        tokenizer.save_pretrained(str(temporary))
        task.save(temporary / TASK_FILE)
        (temporary / RECIPE_FILE).write_text(recipe.to_yaml(), "utf-8")


class AdapterTrainer(Trainer):
    """A `Trainer` that stops at a loss that is not finite, and whose checkpoints are whole."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step; see `Trainer.training_step`."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise BaraError(
                f"the loss is {loss.item()} in step {self.state.global_step + 1}, so training "
                "stopped and nothing was saved over; lower training.learning_rate"
            )
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            (folder / COMPLETE).touch()
        except Exception as error:  # torch and safetensors have types of their own for full disks
            shutil.rmtree(folder, ignore_errors=True)
            raise BaraError(
                f"cannot save the checkpoint {folder}: {first_line(error)}; earlier ones are "
                "intact, so make room and go on with --resume"
            ) from error


class TrainingProgress(TrainerCallback):
    """A progress bar with the loss, on standard error and only on a terminal."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", disable=None
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


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps among those that were written to their end."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _check_output(output: Path, recipe: TrainRecipe, *, resume: bool, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise BaraError(f"{output} is a file; give a folder with --output")
    checkpoint = newest_checkpoint(output / CHECKPOINTS)
    if resume and checkpoint is None:
        raise BaraError(f"{output / CHECKPOINTS} has no complete checkpoint to resume from")
    if resume:
        earlier = TrainRecipe.load(output / CHECKPOINTS / RECIPE_FILE)
        for name in ("model", "method", "method_options"):
            if (before := getattr(earlier, name)) != getattr(recipe, name):
                raise BaraError(
                    f"the run in {output} has {name} = {before}: it can only be resumed with that"
                )
    if not resume and not overwrite and (checkpoint or (output / CONFIG_FILE).exists()):
        raise BaraError(
            f"{output} holds an earlier run: go on with it (--resume), replace it (--overwrite) "
            "or give another --output"
        )


def _prepare_checkpoints(folder: Path, recipe: TrainRecipe, *, resume: bool) -> Path | None:
    checkpoint = newest_checkpoint(folder) if resume else None
    try:
        for other in folder.glob("checkpoint-*"):
            if not (resume and (other / COMPLETE).exists()):
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE_FILE).write_text(recipe.to_yaml(), "utf-8")
    except OSError as error:
        raise BaraError(f"cannot write to {folder}: {error.strerror}") from error
    return checkpoint


def _training_arguments(
    recipe: TrainRecipe, checkpoints: Path, *, evaluate: bool
) -> TrainingArguments:
    options = {"eval_strategy": "epoch", **recipe.training}
    if not evaluate:
        options["eval_strategy"] = "no"
    try:
        return TrainingArguments(
            output_dir=str(checkpoints), seed=recipe.seed, **{"disable_tqdm": True, **options}
        )
    except (ValueError, TypeError, ImportError) as error:
        raise BaraError(f"training: {first_line(error)}") from error


def _longest_input(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> int:
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(tokenizer.model_max_length, positions or tokenizer.model_max_length)


def _absolute(model: str) -> str:
    """A folder's or a file's full path, so that the adapter finds its base model from anywhere."""
    return str(Path(model).resolve()) if Path(model).exists() else model
