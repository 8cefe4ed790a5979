"""Finding learning rate, epochs and strength, and whether an adapter pays at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from bara.data.tables import csv_text
from bara.errors import BaraError
from bara.files import atomic_write_text, only_writer
from bara.finetuning.runners import run_local, run_on_ray
from bara.finetuning.search import (
    Range,
    check_metric,
    held_out_score,
    load_predictive,
    paired_difference,
    probe_recipe,
    save_predictive,
    search_space,
    split_tables,
    with_choice,
)
from bara.finetuning.trials import Search, begin_or_go_on, ended_trials, open_study
from bara.machine import Executor, check_executor
from bara.methods.recipe import TrainRecipe
from bara.methods.table import METHODS, check_recipe
from bara.reports.style import save_figure
from bara.reports.tuning import Trial, tuning_picture

if TYPE_CHECKING:
    from datasets import Dataset
    from optuna.study import Study

RECIPE_FILE, TABLE_FILE, PICTURE_FILE = "recipe.yaml", "trials.csv", "trials.png"
PROBE_RECIPE_FILE = "probe.yaml"
PROBE = "probe"
"""What the study's attribute with the probe's metric, and its predictions are called."""


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        recipe: the best, for `bara train --config`; it is in the folder as `recipe.yaml`.
        trials: all that ended, in their order.
        best: the best of them.
        probe: the probe's metric; None for tasks that have no probe.
        difference, error: the best trial's metric minus the probe's, and the standard error of
            that over the held-out texts.
        pays: whether the best adapter is better than the probe by more than twice that error.
    """

    recipe: TrainRecipe
    trials: list[Trial]
    best: Trial
    probe: float | None = None
    difference: float | None = None
    error: float | None = None
    pays: bool | None = None


def tune(
    recipe: TrainRecipe,
    folder: str | Path,
    train: Dataset | None = None,
    validation: Dataset | None = None,
    *,
    num_trials: int = 20,
    jobs: int | None = None,
    executor: Executor = "local",
    num_gpus: float | None = None,
    ray_address: str | None = None,
    metric: str = "nll",
    num_folds: int = 5,
    num_draws: int = 10,
    ranges: Mapping[str, Range] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Searches the options of a recipe with Optuna, beginning with a linear probe.

    Trials are measured on the validation table, or without one on the folds of the training table
    that they did not see. The first has the recipe's own values; the tree-structured Parzen
    estimator chooses the others, and those that fall behind the median are stopped. Finished trials
    are on the disk: the same call goes on after a kill, and a trial that was running is run again.

    Args:
        recipe: what is tuned; its epochs are the most.
        folder: where trials, table, picture and recipe go.
        train, validation: tables to use instead of those that the recipe names.
        num_trials: in all, those of earlier calls among them.
        jobs: trials at a time, each in a process of its own if there are several; None stands for
            1, and on `ray` for as many as the cluster has room for.
        executor: `local`, this machine; or `ray`, a cluster all of whose machines see the folder,
            the model and the packages.
        num_gpus: of each trial on `ray`; None gives each one where there are any.
        ray_address: of the cluster; None joins the one that the environment names, or starts one
            here.
        metric: of `bara.evaluate` (for texts of `bara evaluate`), to choose by.
        num_folds: of the cross-validation.
        num_draws: of the posterior, for the metrics.
        ranges: (least, largest) of `learning_rate`, `epochs` or `strength`.
        report: is told, in a line, of every trial that ends.

    Raises:
        BaraError: an option, a table or the model cannot be used, the folder holds another search,
            another process searches there, or no trial succeeded.
    """
    check_executor(executor)
    run = run_local
    if executor == "ray":
        run = partial(run_on_ray, address=ray_address, num_gpus=num_gpus)
    try:
        import optuna
    except ImportError as error:
        raise BaraError('Optuna is missing; run `pip install "bara-peft[tune]"`') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_recipe(recipe)
    space = search_space(recipe, dict(ranges or {}))
    parts = split_tables(recipe, train, validation, num_folds)
    check_metric(metric, recipe, parts[0][0])
    search = Search(recipe, parts, space, metric, num_draws, Path(folder))
    refusal = f"another `bara tune` is writing to {folder}; wait for it, or give another --output"
    with only_writer(search.folder / "run.lock", refusal):
        study = open_study(search, seed=recipe.seed)
        begin_or_go_on(search, study)
        probe = _probe(search, study, report)
        trials = tqdm(
            run(search, range(len(ended_trials(study)), num_trials), jobs),
            desc="tuning",
            unit="trial",
            total=num_trials,
            initial=len(ended_trials(study)),
            disable=None,
        )
        for number in trials:
            report(_line(search, next(t for t in ended_trials(study) if t.number == number)))
        tuned = _result(search, ended_trials(study), probe)
        _write(search, tuned)
    return tuned


def _probe(search: Search, study: Study, report: Callable[[str], None]) -> float | None:
    """The probe's metric; None for a task that has no probe."""
    if search.recipe.task not in (None, *METHODS[PROBE].tasks):
        return None
    if PROBE not in study.user_attrs:
        score = held_out_score(
            probe_recipe(search.recipe), search.parts, num_draws=search.num_draws
        )
        assert score.predictive is not None
        save_predictive(search.predictions(PROBE), score.predictive)
        study.set_user_attr(PROBE, search.value(score))
    value = float(study.user_attrs[PROBE])
    report(f"probe: {search.metric} {value:.4f}")
    return value


def _result(search: Search, trials: list[Trial], probe: float | None) -> Tuned:
    finished = [(search.sign * t.value, t) for t in trials if t.value is not None]
    if not finished:
        errors = [trial.error for trial in trials if trial.error]
        raise BaraError(f"no trial was finished{f': {errors[0]}' if errors else ''}")
    best = min(finished, key=lambda pair: pair[0])[1]
    recipe = with_choice(search.recipe, best.choice)
    if probe is None:
        return Tuned(recipe, trials, best)
    ours, theirs = (load_predictive(search.predictions(n)) for n in (best.number, PROBE))
    difference, error = paired_difference(ours, theirs, search.metric, search.recipe.seed)
    pays = -search.sign * difference > 2 * error
    return Tuned(recipe, trials, best, probe, difference, error, pays)


def _write(search: Search, tuned: Tuned) -> None:
    """The recipes, the table and the picture."""
    atomic_write_text(search.folder / RECIPE_FILE, tuned.recipe.to_yaml())
    if tuned.probe is not None:
        recipe = probe_recipe(search.recipe)
        atomic_write_text(search.folder / PROBE_RECIPE_FILE, recipe.to_yaml())
    names = [*search.space, *tuned.best.metrics]
    rows = [
        {"trial": trial.number, "state": trial.state}
        | {name: (trial.choice | trial.metrics).get(name, "") for name in names}
        | {"seconds": round(trial.seconds, 1), "error": trial.error}
        for trial in tuned.trials
    ]
    atomic_write_text(search.folder / TABLE_FILE, csv_text(rows))
    picture = tuning_picture(tuned.trials, tuned.best, search.metric, tuned.probe)
    save_figure(picture, search.folder / PICTURE_FILE)


def _line(search: Search, trial: Trial) -> str:
    chosen = ", ".join(f"{name} {value:.3g}" for name, value in trial.choice.items())
    found = trial.error or trial.state
    if trial.value is not None:
        found = f"{search.metric} {trial.value:.4f}"
    return f"trial {trial.number}: {chosen} ({trial.seconds:.0f} s): {found}"
