"""`bara train`: fine-tune a model on the user's own table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from bara.schema import SEEDS

FLAGS = {
    "rank": "method_options.r",
    "prior_fraction": "method_options.prior_fraction",
    "epochs": "training.num_train_epochs",
    "learning_rate": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
}
"""What options of the command are called in the recipe, where that is another name."""


def train(
    context: Context,
    model: Annotated[
        str | None, Option(help="Folder, .gguf file or hub name of the base model.")
    ] = None,
    data: Annotated[
        str | None,
        Option(
            help="CSV, TSV, JSONL, JSON or Parquet file, a hub data set, or for images a folder "
            "with a folder for each class."
        ),
    ] = None,
    validation: Annotated[str | None, Option(help="A second table, for the loss on it.")] = None,
    output: Annotated[str | None, Option(help="Folder for the adapter.")] = None,
    text_column: Annotated[str | None, Option(help="Column with the texts.")] = None,
    text_pair_column: Annotated[str | None, Option(help="Column with second texts.")] = None,
    label_column: Annotated[str | None, Option(help="Column with classes or targets.")] = None,
    task: Annotated[
        str | None,
        Option(
            help="classification, regression, multi-label, token-classification, "
            "question-answering, causal-lm, multiple-choice, seq2seq or image-classification."
        ),
    ] = None,
    scoring: Annotated[str | None, Option(help="Multiple choice by text or letter.")] = None,
    max_length: Annotated[
        int | None, Option(min=1, max=2**31 - 1, help="Longest input in tokens.")
    ] = None,
    method: Annotated[
        str | None,
        Option(
            help="bara, balora, probe, lora, full, setfit, adalora, blob, clora, sgp-lora, "
            "scalabl, rankwise, mc-dropout, ensemble, tfb, laplace, ivon, monteclora, pvera or "
            "certified; NAME+temperature also fits a temperature on the validation table."
        ),
    ] = None,
    rank: Annotated[int | None, Option("--rank", "-r", help="Maximum rank r.")] = None,
    prior_fraction: Annotated[
        float | None,
        Option(min=0, max=1, help="certified only: part of the data to learn the prior on."),
    ] = None,
    epochs: Annotated[float | None, Option(help="Passes over the data.")] = None,
    learning_rate: Annotated[float | None, Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, Option(help="Examples in a training step.")] = None,
    seed: Annotated[
        int | None, Option(min=0, max=SEEDS - 1, help="Seed of all randomness.")
    ] = None,
    options: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any option of the recipe, e.g. training.weight_decay=0.01 or "
            "method_options.target_modules=all-linear. Repeatable.",
        ),
    ] = None,
    config: Annotated[Path | None, Option(help="Recipe (YAML); flags go before it.")] = None,
    save_config: Annotated[
        Path | None, Option(help="Write the whole recipe to this file, and train.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check the recipe; do not train.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier run.")] = False,
) -> None:
    """Fine-tune a model on a table of texts; writes an adapter folder."""
    from bara.cards.adapter_files import RECIPE_FILE
    from bara.cli.terminal import say_next, say_without_dry_run
    from bara.errors import BaraError
    from bara.files import atomic_write_text
    from bara.finetuning.checkpoints import CHECKPOINTS
    from bara.finetuning.finetune import finetune
    from bara.language.tasks import GENERATING_TASKS
    from bara.machine import quieten_libraries
    from bara.methods.recipe import TrainRecipe
    from bara.methods.table import check_recipe
    from bara.models.gguf import smollm2_path

    quieten_libraries()
    recipe = TrainRecipe.load(config) if config else TrainRecipe(task=task)
    earlier = Path(output or recipe.output) / CHECKPOINTS / RECIPE_FILE
    if resume and config is None and earlier.is_file():
        recipe = TrainRecipe.load(earlier)
    elif resume and config is None and model is None:
        raise BaraError(f"{earlier.parent} has no run to resume; give its folder with --output")
    typed: dict[str, Any] = {
        "model": model,
        "data": data,
        "validation": validation,
        "output": output,
        "text_column": text_column,
        "text_pair_column": text_pair_column,
        "label_column": label_column,
        "task": task,
        "scoring": scoring,
        "max_length": max_length,
        "method": method,
        "rank": rank,
        "prior_fraction": prior_fraction,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
    }
    given = {FLAGS.get(name, name): v for name, v in typed.items() if v is not None}
    recipe = recipe.with_options({**parse_options(options or []), **given})
    if recipe.task in ("causal-lm", "multiple-choice") and not recipe.model:
        recipe = recipe.with_options({"model": str(smollm2_path())})
    flags = {FLAGS.get(name, name): f"--{name.replace('_', '-')}" for name in typed}
    check_recipe(recipe, {name: flag for name, flag in flags.items() if name in given})
    if save_config:
        atomic_write_text(save_config, recipe.to_yaml())
    if dry_run:
        print(recipe.to_yaml(), end="")
        say_without_dry_run(context)
        return
    folder = finetune(recipe, resume=resume, overwrite=overwrite)
    print(f"The adapter is in {folder}.")
    use: list[object] = ["predict", folder, "--data", "TABLE", "--output", "predictions.jsonl"]
    if recipe.task in GENERATING_TASKS:
        use = ["generate", folder, "PROMPT"]
    labelled = recipe.validation or "TABLE"
    say_next(["bara", "evaluate", folder, "--data", labelled], ["bara", *use])


def parse_options(options: list[str]) -> dict[str, Any]:
    """The values of repeated `NAME=VALUE` options, read as YAML.

    Raises:
        BaraError: an option has no `=`, or its value is no YAML.
    """
    from bara.errors import BaraError
    from bara.methods.recipe import parse_yaml
    from bara.schema import shown

    values = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise BaraError(f"--set needs NAME=VALUE, not {option!r}")
        try:
            values[name.strip()] = parse_yaml(value)
        except BaraError as error:
            raise BaraError(f"--set {shown(option)}: the value is {error}") from error
    return values
