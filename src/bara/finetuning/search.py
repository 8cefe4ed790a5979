"""What a search for options needs: its space, held-out tables, and the score of one choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerCallback

from bara.data.tag_task import TagTask
from bara.data.text_task import TextTask
from bara.errors import BaraError
from bara.evaluation.metrics import measure
from bara.evaluation.task_metrics import marks_entities
from bara.finetuning.finetune import finetune, read_train, task_of
from bara.finetuning.load import load_adapter
from bara.finetuning.task_inputs import predict_table, read_table
from bara.language.evaluation import token_metrics
from bara.language.tasks import GENERATING_TASKS
from bara.methods.recipe import BY_STEPS, TrainRecipe
from bara.methods.table import parse_method
from bara.prediction.predictive import ClassificationPredictive, RegressionPredictive

if TYPE_CHECKING:
    from datasets import Dataset

OF_ENTITIES = ("f1", "precision", "recall")
"""Further metrics of tags that mark entities."""
MAXIMISED = (
    *("accuracy", "spearman", "subset_accuracy", "f1_micro", "f1_macro", "exact_match"),
    *OF_ENTITIES,
)
"""Metrics of which more is better; of the others to choose by less is."""
OF_CLASSES = ("nll", "accuracy", "ece", "brier", "aurc")
OF_LABELS = ("subset_accuracy", "hamming", "f1_micro", "f1_macro", "label_nll")
METRICS = {
    "regression": ("nll", "aurc", "rmse", "mae", "spearman"),
    "multi-label": ("nll", "ece", "brier", "aurc", *OF_LABELS),
    "question-answering": ("nll", "ece", "aurc", "exact_match", "f1"),
    **dict.fromkeys(GENERATING_TASKS, ("nll", "perplexity", "accuracy")),
}
"""Metrics to choose by, where they are not those of classes."""
OPTION_OF = {
    "learning_rate": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "strength": "method_options.strength",
}
"""What is searched, by its name in a recipe."""
FEWER_EPOCHS, RATES, STRENGTHS = 8, 10.0, 10.0
"""How far the ranges go from a recipe's own values, as factors."""
BOOTSTRAP = 100
"""Resamples of the held-out texts, for the error of a difference."""

Range = tuple[float, float]
Comparable = ClassificationPredictive | RegressionPredictive
"""Predictions that folds are pooled of, and compared with the probe's."""
Parts = Sequence[tuple["Dataset", "Dataset"]]
"""Tables to train on, each with one to measure on."""


def search_space(recipe: TrainRecipe, given: dict[str, Range]) -> dict[str, Range]:
    """The least and the largest value of everything that is searched.

    Args:
        recipe: its values lie inside, the epochs at the end.
        given: ranges to take instead.

    Raises:
        BaraError: the method has nothing to search, or it or the number of steps leaves no use for
            a range that is given.
    """
    method, tempered = parse_method(recipe.method)
    if not method.by_steps:
        raise BaraError(
            f"method {recipe.method} has no learning rate, epochs or strength to tune (--method): "
            "train it"
        )
    if tempered:
        raise BaraError(
            "a temperature is fitted to the texts that choices are compared on: tune without "
            "+temperature (--method), and add it when you train with the recipe"
        )
    rate, epochs = (recipe.training[n] for n in ("learning_rate", "num_train_epochs"))
    space = {"learning_rate": (rate / RATES, rate * RATES)}
    if (steps := recipe.training.get("max_steps", 0)) <= 0:
        space["epochs"] = (max(1, round(epochs / FEWER_EPOCHS)), max(1, round(epochs)))
    elif "epochs" in given:
        raise BaraError(
            f"training.max_steps={steps} is how long every trial trains, whatever the epochs "
            "(--epochs): leave out one of the two"
        )
    if method.has_strength:
        space["strength"] = (1 / STRENGTHS, STRENGTHS)
    for name, (low, high) in given.items():
        what = f"{name.replace('_', ' ')} (--{name.replace('_', '-')})"
        if name not in space:
            raise BaraError(f"method {recipe.method} has no {what} to tune")
        if not 0 < low <= high < math.inf:
            raise BaraError(f"the range of the {what} must be two numbers, 0 < low <= high")
    return space | given


def check_metric(metric: str, recipe: TrainRecipe, train: Dataset) -> None:
    """Raises BaraError for a metric that nothing can be chosen by in the task of a table."""
    task = task_of(recipe, train)
    known = METRICS.get(task.task, OF_CLASSES)
    if isinstance(task, TagTask) and marks_entities(task.label_names):
        known += OF_ENTITIES
    if metric not in known:
        raise BaraError(
            f"{task.task} has the metrics {', '.join(known)}, not {metric!r} (--metric)"
        )


def with_choice(recipe: TrainRecipe, choice: dict[str, float]) -> TrainRecipe:
    """The recipe with chosen values."""
    return recipe.with_options({OPTION_OF[name]: value for name, value in choice.items()})


def probe_recipe(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe's task for the method `probe`."""
    training = {name: value for name, value in recipe.training.items() if name not in BY_STEPS}
    return replace(  # without the validation table: it has a cross-validation of its own
        recipe,
        method="probe",
        method_options={},
        training=training,
        validation=None,
        validation_split=None,
    )


def split_tables(
    recipe: TrainRecipe, train: Dataset | None, validation: Dataset | None, num_folds: int
) -> Parts:
    """The training table with the validation table, or the folds of a cross-validation.

    Classes keep their share in every fold where each has a row for it, and are known to all of
    them in any case.

    Raises:
        BaraError: a table cannot be read, or has fewer rows than there are folds.
    """
    train = read_train(recipe) if train is None else train
    task = task_of(recipe, train)
    if validation is None and recipe.validation:
        validation = read_table(recipe.validation, task, split=recipe.validation_split)
    if isinstance(task, TextTask) and task.task == "classification":
        train = _with_classes(train, task)
        validation = None if validation is None else _with_classes(validation, task)
    if validation is not None:
        return [(train, validation)]
    if not 2 <= num_folds <= len(train):
        raise BaraError(f"{len(train)} rows cannot be shared out among {num_folds} folds (--folds)")
    label = None
    if isinstance(task, TextTask) and task.task == "classification":
        label = task.label_column
    return [(train.select(a), train.select(b)) for a, b in _folds(train, label, num_folds, recipe)]


def _folds(train: Dataset, label: str | None, num_folds: int, recipe: TrainRecipe) -> Any:
    from sklearn.model_selection import KFold, StratifiedKFold

    options: dict[str, Any] = {"shuffle": True, "random_state": recipe.seed}
    if label is not None:
        classes = list(train[label])
        if min(classes.count(name) for name in set(classes)) >= num_folds:
            return StratifiedKFold(num_folds, **options).split(classes, classes)
    return KFold(num_folds, **options).split(range(len(train)))


def _with_classes(table: Dataset, task: TextTask) -> Dataset:
    from datasets import ClassLabel

    feature = ClassLabel(names=list(task.label_names))
    labels = task.encode_labels(table)
    return table.remove_columns(task.label_column).add_column(
        task.label_column, labels, feature=feature
    )


@dataclass(frozen=True)
class Score:
    """How a choice did on held-out data.

    Attributes:
        metrics: of `bara.evaluate`; for texts of `bara.language.evaluation.token_metrics`.
        predictive: the predictions, fold after fold; None for other tasks than classification,
            regression and multiple choice.
    """

    metrics: dict[str, float]
    predictive: Comparable | None


def held_out_score(
    recipe: TrainRecipe,
    parts: Parts,
    *,
    num_draws: int,
    callbacks: Sequence[TrainerCallback] = (),
    after_part: Callable[[Score, int], None] = lambda score, number: None,
) -> Score:
    """Trains on each part's table and measures the predictions of all held-out tables together.

    Args:
        recipe: to train with.
        parts: of `split_tables`.
        num_draws: of the posterior; their seed is the recipe's.
        callbacks: for the `Trainer`.
        after_part: called after all parts but the last with the score so far.

    Raises:
        BaraError: as `finetune`.
    """
    found: list[Score] = []
    for number, (train, held_out) in enumerate(parts, start=1):
        with TemporaryDirectory(prefix="bara-tune-") as folder:
            training = {**recipe.training, "save_strategy": "no"}
            run = replace(recipe, output=f"{folder}/adapter", training=training)
            finetune(run, train, held_out, callbacks=callbacks)
            found.append(_score(run, held_out, num_draws))
        if number < len(parts):
            after_part(_pooled(found), number)
    return _pooled(found)


def _score(recipe: TrainRecipe, table: Dataset, num_draws: int) -> Score:
    model, tokenizer, task = load_adapter(recipe.output)
    options: dict[str, Any] = {"num_draws": num_draws, "seed": recipe.seed, "progress": False}
    if task.task in GENERATING_TASKS:
        return Score(token_metrics(model, task.inputs(table, tokenizer), **options), None)
    predictive = predict_table(model, tokenizer, task, table, **options)
    kept = predictive if isinstance(predictive, Comparable) else None
    return Score(measure(predictive).to_dict(), kept)


def _pooled(scores: Sequence[Score]) -> Score:
    """All predictions as one; for other tasks the means of the metrics."""
    if len(scores) == 1:
        return scores[0]
    predictives = [score.predictive for score in scores if score.predictive is not None]
    if not predictives:
        metrics = scores[0].metrics
        means = {n: sum(score.metrics[n] for score in scores) / len(scores) for n in metrics}
        return Score(means, None)
    labels = torch.cat([p.labels for p in predictives if p.labels is not None])
    first = predictives[0]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(p, name) for p in predictives], 1)

    pooled: Comparable
    if isinstance(first, ClassificationPredictive):
        parts = [p.log_probs_draws for p in predictives if isinstance(p, ClassificationPredictive)]
        most = max(part.shape[2] for part in parts)  # choices: a question may have fewer
        padded = [pad(part, (0, most - part.shape[2]), value=-math.inf) for part in parts]
        pooled = ClassificationPredictive(torch.cat(padded, 1), labels)
    else:
        pooled = RegressionPredictive(joined("mean_draws"), joined("variance_draws"), labels)
    return Score(measure(pooled).to_dict(), pooled)


def save_predictive(path: Path, predictive: Comparable) -> None:
    """Writes the mixture over draws, with its labels."""
    assert predictive.labels is not None
    if isinstance(predictive, ClassificationPredictive):
        tensors = {"log_probs_draws": predictive.log_probs.unsqueeze(0)}
    else:
        tensors = {"mean_draws": predictive.mean_draws, "variance_draws": predictive.variance_draws}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.contiguous() for n, t in (tensors | {"labels": predictive.labels}).items()}, path
    )


def load_predictive(path: Path) -> Comparable:
    """Reads what `save_predictive` wrote."""
    tensors = load_file(path)
    if "log_probs_draws" in tensors:
        return ClassificationPredictive(tensors["log_probs_draws"], tensors["labels"])
    return RegressionPredictive(**tensors)


def paired_difference(
    ours: Comparable, theirs: Comparable, metric: str, seed: int = 0
) -> tuple[float, float]:
    """Ours minus theirs in a metric on the same inputs, and its standard error by the bootstrap.

    Args:
        ours, theirs: labelled predictions of the same inputs in the same order.
        metric: one that `measure` knows.
        seed: of the resamples of the inputs.
    """

    def difference(rows: Tensor) -> float:
        values = [measure(p.select(rows)).metrics[metric] for p in (ours, theirs)]
        return float(values[0] - values[1])

    assert ours.labels is not None
    n = len(ours.labels)
    generator = torch.Generator().manual_seed(seed)
    resampled = [difference(torch.randint(n, (n,), generator=generator)) for _ in range(BOOTSTRAP)]
    return difference(torch.arange(n)), float(torch.tensor(resampled).std())
