"""The trials of a search: in Optuna's journal, one after the other or side by side."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bara.data.tables import table_digest
from bara.errors import BaraError, first_line
from bara.finetuning.search import (
    MAXIMISED,
    Parts,
    Range,
    Score,
    held_out_score,
    save_predictive,
    with_choice,
)
from bara.methods.recipe import TrainRecipe
from bara.reports.tuning import Trial

if TYPE_CHECKING:
    from optuna.study import Study

JOURNAL, PREDICTIONS = "trials.journal", "held-out"
STUDY, SETTINGS, ERROR = "bara-tune", "settings", "error"
RANDOM_TRIALS = 5
"""Trials at random places, before the sampler learns from them."""


@dataclass(frozen=True)
class Search:
    """Everything that decides a search; processes hand it on.

    Attributes:
        recipe: with the values that trials do not change.
        parts: tables to train on and to measure on.
        space: ranges of what is searched.
        metric: to choose by.
        num_draws: of the posterior.
        folder: where the trials are kept.
    """

    recipe: TrainRecipe
    parts: Parts
    space: dict[str, Range]
    metric: str
    num_draws: int
    folder: Path

    @property
    def sign(self) -> int:
        """1 where less of the metric is better, else -1."""
        return -1 if self.metric in MAXIMISED else 1

    def value(self, score: Score) -> float:
        """The metric of a score."""
        return score.metrics[self.metric]

    def predictions(self, name: str | int) -> Path:
        """File of the held-out predictions of a trial, or of the probe."""
        return self.folder / PREDICTIONS / f"{name}.safetensors"

    def settings(self) -> dict[str, Any]:
        """What must not change when a search goes on."""
        recipe = {k: v for k, v in asdict(self.recipe).items() if k != "output"}
        tables = [[table_digest(table) for table in part] for part in self.parts]
        space = {name: list(values) for name, values in self.space.items()}
        return {
            **{"recipe": recipe, "number of folds": len(tables), "table": tables, "space": space},
            **{"metric": self.metric, "num_draws": self.num_draws},
        }


def open_study(search: Search, seed: int) -> Study:
    """The search's study in its journal."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    search.folder.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        study_name=STUDY,
        storage=JournalStorage(JournalFileBackend(str(search.folder / JOURNAL))),
        sampler=optuna.samplers.TPESampler(
            n_startup_trials=RANDOM_TRIALS, seed=seed, constant_liar=True
        ),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=RANDOM_TRIALS),
        direction="minimize" if search.sign > 0 else "maximize",
        load_if_exists=True,
    )


def begin_or_go_on(search: Search, study: Study) -> None:
    """Enters the first trial, or the trials that were running when an earlier process ended."""
    from optuna.trial import TrialState

    settings = json.loads(json.dumps(search.settings()))
    if SETTINGS not in study.user_attrs:
        study.set_user_attr(SETTINGS, settings)
        training = search.recipe.training
        own = {
            "learning_rate": training["learning_rate"],
            "epochs": round(training["num_train_epochs"]),
            "strength": search.recipe.method_options.get("strength", 1.0),
        }
        study.enqueue_trial(
            {name: min(max(own[name], low), high) for name, (low, high) in search.space.items()}
        )
    earlier = study.user_attrs[SETTINGS]
    if settings.keys() != earlier.keys():
        raise BaraError(
            f"{search.folder} holds a search of another version of bara, which cannot go on: give "
            "another --output"
        )
    if changed := [name for name in settings if settings[name] != earlier[name]]:
        raise BaraError(
            f"{search.folder} holds a search with another {changed[0]}: it can only go on as it "
            "was; give another --output"
        )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)


def run_trial(search: Search, number: int) -> int:
    """Runs one trial of a search that has begun.

    Args:
        search: the search.
        number: of the trial among those that were asked for; it seeds the sampler.

    Returns:
        Optuna's number of it.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = open_study(search, seed=(search.recipe.seed + number) % 2**32)
    trial = study.ask()
    try:
        value = _objective(search, trial)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except BaraError as error:
        trial.set_user_attr(ERROR, first_line(error))
        # the sampler would go back to where trials fail: it leaves out those, and not the stopped
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, value)
    return trial.number


def _objective(search: Search, trial: Any) -> float:
    import optuna

    choice: dict[str, float] = {}
    for name, (low, high) in search.space.items():
        if name == "epochs":
            choice[name] = trial.suggest_int(name, round(low), round(high), log=True)
        else:
            choice[name] = trial.suggest_float(name, low, high, log=True)

    def after_part(score: Score, number: int) -> None:
        trial.report(search.value(score), number)
        if trial.should_prune():
            raise optuna.TrialPruned

    score = held_out_score(
        with_choice(search.recipe, choice),
        search.parts,
        num_draws=search.num_draws,
        callbacks=[_Pruning(trial, search.sign)] if len(search.parts) == 1 else [],
        after_part=after_part,
    )
    if score.predictive is not None:
        save_predictive(search.predictions(trial.number), score.predictive)
    trial.set_user_attr("metrics", score.metrics)
    return search.value(score)


class _Pruning(TrainerCallback):
    """Tells a trial the held-out loss of every epoch, and stops one that falls behind."""

    def __init__(self, trial: Any, sign: int) -> None:
        self.trial = trial
        self.sign = sign
        self._step = 0

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        import optuna

        self._step += 1
        self.trial.report(self.sign * kwargs["metrics"]["eval_loss"], self._step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def ended_trials(study: Study) -> list[Trial]:
    """The trials that were finished or stopped, or that failed by themselves."""
    return [
        Trial(
            number=trial.number,
            choice=dict(trial.params),
            value=trial.value if trial.state.name == "COMPLETE" else None,
            state=_state(trial),
            metrics=trial.user_attrs.get("metrics", {}),
            seconds=trial.duration.total_seconds() if trial.duration else 0.0,
            error=trial.user_attrs.get(ERROR, ""),
        )
        for trial in study.get_trials(deepcopy=False)
        if trial.state.name in ("COMPLETE", "PRUNED")
    ]


def _state(trial: Any) -> str:
    if ERROR in trial.user_attrs:
        return "failed"
    return "finished" if trial.state.name == "COMPLETE" else "stopped"
