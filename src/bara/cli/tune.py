"""`bara tune`: find the options of a training on the user's own table."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from bara.cli.options import Executor, Gpus, RayAddress, refuse_without_ray
from bara.schema import MAX_DRAWS, SEEDS


def tune(
    model: Annotated[
        str | None, Option(help="Folder, .gguf file or hub name of the base model.")
    ] = None,
    data: Annotated[str | None, Option(help="Training table: a file or a hub data set.")] = None,
    validation: Annotated[
        str | None, Option(help="Table to compare on; without it, the folds of --data.")
    ] = None,
    output: Annotated[Path, Option(help="Folder for trials, table, picture and recipe.")] = Path(
        "bara-tune"
    ),
    task: Annotated[str | None, Option(help="As for `bara train`.")] = None,
    method: Annotated[str | None, Option(help="As for `bara train`.")] = None,
    metric: Annotated[
        str, Option(help="To choose by: nll, accuracy, ece, brier, aurc, rmse, mae, spearman, ...")
    ] = "nll",
    trials: Annotated[
        int, Option(min=1, max=10_000, help="In all, with those of earlier runs.")
    ] = 20,
    jobs: Annotated[
        int | None,
        Option(
            min=1, max=1024, help="Trials at a time; by default 1, on Ray as many as have room."
        ),
    ] = None,
    executor: Annotated[
        Executor, Option(help="Where the trials run: this machine, or a Ray cluster.")
    ] = Executor.local,
    ray_address: RayAddress = None,
    gpus: Gpus = None,
    folds: Annotated[
        int | None, Option(min=2, max=1000, help="Of the cross-validation; 5 by default.")
    ] = None,
    num_draws: Annotated[int, Option(min=1, max=MAX_DRAWS, help="Posterior draws.")] = 10,
    learning_rate: Annotated[
        tuple[float, float] | None, Option(help="Least and largest learning rate.")
    ] = None,
    epochs: Annotated[tuple[int, int] | None, Option(help="Fewest and most epochs.")] = None,
    strength: Annotated[
        tuple[float, float] | None, Option(help="Least and largest strength of the KL.")
    ] = None,
    seed: Annotated[
        int | None, Option(min=0, max=SEEDS - 1, help="Seed of all randomness.")
    ] = None,
    options: Annotated[
        list[str] | None,
        Option("--set", metavar="NAME=VALUE", help="Any option of the recipe. Repeatable."),
    ] = None,
    config: Annotated[Path | None, Option(help="Recipe (YAML); flags go before it.")] = None,
) -> None:
    """Find learning rate, epochs and strength, and whether an adapter pays; writes a recipe.

    The same command goes on with a search that was interrupted.
    """
    from tqdm.auto import tqdm

    from bara.cli.terminal import say_next
    from bara.cli.train import parse_options
    from bara.errors import BaraError
    from bara.finetuning.tune import PICTURE_FILE, PROBE_RECIPE_FILE, RECIPE_FILE, TABLE_FILE
    from bara.finetuning.tune import tune as search
    from bara.machine import quieten_libraries
    from bara.methods.recipe import TrainRecipe
    from bara.methods.table import check_recipe
    from bara.models.gguf import smollm2_path

    refuse_without_ray(executor, {"--ray-address": ray_address, "--gpus": gpus})
    quieten_libraries()
    recipe = TrainRecipe.load(config) if config else TrainRecipe(task=task)
    typed: dict[str, Any] = {
        "model": model,
        "data": data,
        "validation": validation,
        "task": task,
        "method": method,
        "seed": seed,
    }
    given = {name: value for name, value in typed.items() if value is not None}
    recipe = recipe.with_options({**parse_options(options or []), **given})
    if recipe.task in ("causal-lm", "multiple-choice") and not recipe.model:
        recipe = recipe.with_options({"model": str(smollm2_path())})
    check_recipe(recipe, {name: f"--{name}" for name in given})
    if folds is not None and recipe.validation:
        raise BaraError("--folds are of --data where there is no --validation: leave one out")
    ranges = {"learning_rate": learning_rate, "epochs": epochs, "strength": strength}
    tuned = search(
        recipe,
        output,
        num_trials=trials,
        jobs=jobs,
        executor=executor.value,
        num_gpus=gpus,
        ray_address=ray_address,
        metric=metric,
        num_folds=folds or 5,
        num_draws=num_draws,
        ranges={name: value for name, value in ranges.items() if value is not None},
        report=partial(tqdm.write, file=sys.stderr),
    )
    _print_table(tuned, metric)
    print(verdict(tuned, metric))
    print(f"{output / TABLE_FILE} and {output / PICTURE_FILE} show what was tried.")
    recipes = {"my-adapter": RECIPE_FILE}
    if tuned.pays is False:
        recipes["my-probe"] = PROBE_RECIPE_FILE
    say_next(
        *(
            ["bara", "train", "--config", output / file, "--output", folder]
            for folder, file in recipes.items()
        )
    )


def verdict(tuned: Any, metric: str) -> str:
    """Whether an adapter pays, in a line."""
    if tuned.probe is None:
        return "There is no probe for this task to compare with."
    numbers = (
        f"{metric} {tuned.best.value:.4f} against the probe's {tuned.probe:.4f} "
        f"({tuned.difference:+.4f} ± {tuned.error:.4f})"
    )
    if tuned.pays:
        return f"An adapter pays: {numbers}."
    return (
        f"An adapter does not clearly pay: {numbers}. The frozen model with a linear head does as "
        "well."
    )


def _print_table(tuned: Any, metric: str) -> None:
    from rich.table import Table

    from bara.cli.terminal import console

    names = list(tuned.best.choice)
    table = Table(padding=(0, 0, 0, 1), caption="* the best; stopped: fell behind the median")
    for heading in ("trial", *names, metric, "s"):
        table.add_column(heading.replace("_", " "), justify="right")
    for trial in tuned.trials:
        mark = " *" if trial.number == tuned.best.number else ""
        found = trial.state if trial.value is None else f"{trial.value:.4f}{mark}"
        chosen = [f"{trial.choice[name]:.3g}" if name in trial.choice else "–" for name in names]
        table.add_row(str(trial.number), *chosen, found, f"{trial.seconds:.0f}")
    console().print(table)
