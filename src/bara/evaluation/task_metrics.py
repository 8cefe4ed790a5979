"""Metrics of predictions that are made of several: labels, words, spans."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

# torchmetrics and seqeval take seconds to import, so the functions that use them do.
import torch
from torch import Tensor

from bara.errors import BaraError
from bara.evaluation.curves import event_calibration_error, risk_coverage
from bara.prediction.multi_label import MultiLabelPredictive
from bara.prediction.predictive import Predictive
from bara.prediction.spans import SpanPredictive
from bara.prediction.words import IGNORED, TokenPredictive

ENTITY_TAG = re.compile(r"[BIESLU]-.+")
"""A tag of a scheme that marks where an entity begins, goes on and ends; O is outside of all."""

MEANS_OVER_LABELS = {"f1_macro": "f1", "label_nll": "nll", "ece": "ece", "brier": "brier"}
"""Metrics of an input's labels, and the scores of each label that they are means of."""


def multi_label_metrics(predictive: MultiLabelPredictive) -> dict[str, float]:
    """Metrics of the mixture over draws.

    Args:
        predictive: labelled predictions for n inputs.

    Returns:
        - ``subset_accuracy``: share of inputs all of whose labels are as predicted.
        - ``hamming``: share of the labels, over all inputs, that are not as predicted.
        - ``f1_micro``, ``f1_macro``: F1 of all labels together, and the mean of each label's; 0
          for a label that is neither there nor predicted.
        - ``nll``: mean negative log-likelihood of an input's labels together, nats.
        - ``label_nll``, ``ece``, ``brier``: means over labels of `label_scores`.
        - ``aurc``: area under the risk–coverage curve; the error is that of ``subset_accuracy``,
          the uncertainty 1 - probability that all labels are as predicted.

    Raises:
        BaraError: no inputs or no labels.
    """
    from torchmetrics.functional.classification import binary_f1_score

    labels = _known(predictive.labels).long()
    predicted = predictive.prediction.long()
    scores = list(label_scores(predictive).values())
    uncertainty, errors = task_selection(predictive)
    return {
        "subset_accuracy": 1 - errors.mean().item(),
        # torchmetrics' scores of several labels refuse a single one
        "hamming": (predicted != labels).double().mean().item(),
        "f1_micro": float(binary_f1_score(predicted.flatten(), labels.flatten())),
        "nll": -predictive.log_prob(labels).mean().item(),
        **{
            name: sum(score[key] for score in scores) / len(scores)
            for name, key in MEANS_OVER_LABELS.items()
        },
        "aurc": risk_coverage(uncertainty, errors)[1].mean().item(),
    }


def label_scores(predictive: MultiLabelPredictive) -> dict[str, dict[str, float]]:
    """Metrics of each label alone, by its name.

    Returns:
        ``frequency``, the share of inputs that have it; ``f1``; ``nll``, mean negative
        log-likelihood in nats; ``ece``, the expected calibration error of its probability, 15 bins
        of equal width; ``brier``, mean squared distance of probability and label, 0 … 1.

    Raises:
        BaraError: no inputs or no labels.
    """
    from torchmetrics.functional.classification import binary_f1_score

    labels = _known(predictive.labels)
    probs, nll = predictive.probs, -predictive.label_log_prob(labels)
    return {
        name: {
            "frequency": labels[:, i].float().mean().item(),
            "f1": float(binary_f1_score((probs[:, i] > 0.5).long(), labels[:, i].long())),
            "nll": nll[:, i].mean().item(),
            "ece": event_calibration_error(probs[:, i], labels[:, i]),
            "brier": (probs[:, i] - labels[:, i]).square().mean().item(),
        }
        for i, name in enumerate(predictive.names)
    }


def token_metrics(predictive: TokenPredictive) -> dict[str, float]:
    """The scores of entities: ``precision``, ``recall`` and ``f1`` of seqeval's micro average.

    An entity is right if its words and its type are. Empty where the tags mark no entities.

    Raises:
        BaraError: no word has a label, or seqeval is not installed.
    """
    report = _entities(predictive)
    names = {"precision": "precision", "recall": "recall", "f1": "f1-score"}
    return {name: float(report["micro avg"][key]) for name, key in names.items()} if report else {}


def tag_scores(predictive: TokenPredictive) -> dict[str, dict[str, float]] | None:
    """``precision``, ``recall``, ``f1`` and ``support`` (their number) of each type of entity."""
    report = _entities(predictive)
    if not report:
        return None
    return {
        name: {key.removesuffix("-score"): float(value) for key, value in scores.items()}
        for name, scores in report.items()
        if not name.endswith(" avg")
    }


def marks_entities(tags: Sequence[str]) -> bool:
    """Whether tags mark entities: O, and others that say where one begins or goes on."""
    return "O" in tags and all(ENTITY_TAG.fullmatch(name) for name in tags if name != "O")


def _entities(predictive: TokenPredictive) -> dict[str, Any]:
    """seqeval's report on the words that have a label; empty if the tags mark no entities."""
    words = predictive.labelled
    names = words.label_names or ()
    if not marks_entities(names):
        return {}
    if find_spec("seqeval") is None:
        raise BaraError("the scores of entities need a package: pip install 'bara-peft[tasks]'")
    from seqeval.metrics import classification_report

    # seqeval counts by B, I, E and S; last and unit words have two names
    tags = [{"L": "E", "U": "S"}.get(name[0], name[0]) + name[1:] for name in names]
    right, predicted = [], []
    for part in predictive.split():
        assert part.labels is not None
        labelled = part.labels != IGNORED
        if labelled.any():
            right.append([tags[i] for i in part.labels[labelled].tolist()])
            predicted.append([tags[i] for i in part.prediction[labelled].tolist()])
    report: dict[str, Any] = classification_report(
        right, predicted, output_dict=True, zero_division=0
    )
    return report


def span_metrics(predictive: SpanPredictive) -> dict[str, float]:
    """Metrics of the most probable answers under the mixture over draws.

    Args:
        predictive: predictions for questions with references.

    Returns:
        ``exact_match`` and ``f1`` as SQuAD counts them (case, punctuation, articles and spaces
        aside; the best reference; of words), 0 … 1; ``nll``, mean negative log-probability of the
        references' spans together, nats; ``ece``, calibration error of the predicted span's
        probability, 15 bins of equal width, the event being an exact match; ``aurc``, area under
        the risk–coverage curve of 1 - exact match.

    Raises:
        BaraError: a question has no references.
    """
    nll = -predictive.label_log_prob
    uncertainty, errors = task_selection(predictive)
    scores = [
        _squad(prediction, texts)["f1"]
        for prediction, texts in zip(predictive.prediction, predictive.labels or (), strict=True)
    ]
    return {
        "exact_match": 1 - errors.mean().item(),
        "f1": sum(scores) / len(scores),
        "nll": nll.mean().item(),
        "ece": event_calibration_error(predictive.confidence, errors == 0),
        "aurc": risk_coverage(uncertainty, errors)[1].mean().item(),
    }


def _squad(prediction: str, texts: tuple[str, ...]) -> dict[str, float]:
    from torchmetrics.functional.text import squad

    answers: Any = {"text": list(texts) or [""], "answer_start": [0]}
    scores = squad([{"prediction_text": prediction, "id": ""}], [{"answers": answers, "id": ""}])
    return {name: float(value) / 100 for name, value in scores.items()}


def task_selection(predictive: Predictive) -> tuple[Tensor, Tensor]:
    """(n,) uncertainties, 1 - probability of the whole prediction, and (n,) losses, 1 unless all
    of it is right: all labels, all words that have one, an exact match.

    Raises:
        BaraError: no inputs, or no labels: of words one of every input.
    """
    if isinstance(predictive, MultiLabelPredictive):
        wrong = (predictive.prediction != _known(predictive.labels).bool()).any(1)
    elif isinstance(predictive, TokenPredictive):
        labels, prediction = _known(predictive.labels), predictive.words.prediction
        known, count = labels != IGNORED, len(predictive.lengths)
        silent = predictive.owners[known].bincount(minlength=count) == 0
        if silent.any():  # it would count as right
            raise BaraError(
                f"metrics need labels: input number {int(silent.int().argmax())} has no word with "
                "a label"
            )
        errors = predictive.owners[known & (prediction != labels)]
        wrong = errors.bincount(minlength=count) > 0
    else:
        assert isinstance(predictive, SpanPredictive)
        if predictive.labels is None:
            raise BaraError("metrics need labels: a question has no answers to compare with")
        pairs = zip(predictive.prediction, predictive.labels, strict=True)
        wrong = torch.tensor([_squad(text, right)["exact_match"] < 1 for text, right in pairs])
    return 1 - predictive.confidence, wrong.double()


def _known(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise BaraError("metrics need labels: the data has no label column and none were given")
    if len(labels) == 0:
        raise BaraError("the data has no inputs: there is nothing to evaluate")
    return labels
