"""How good predictions are, and how far their confidence can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

# torchmetrics and scikit-learn take seconds to import, so the functions that use them do.
import torch
from torch import Tensor
from torch.nn import functional as F

from bara.errors import BaraError
from bara.evaluation.curves import NUM_BINS, below_one, risk_coverage
from bara.evaluation.task_metrics import (
    label_scores,
    multi_label_metrics,
    span_metrics,
    tag_scores,
    task_selection,
    token_metrics,
)
from bara.prediction.multi_label import MultiLabelPredictive
from bara.prediction.predictive import (
    ClassificationPredictive,
    Predictive,
    RegressionPredictive,
    check_classes,
)
from bara.prediction.spans import SpanPredictive
from bara.prediction.words import TokenPredictive


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of one model on one data set, with the predictions they came from.

    Attributes:
        metrics: one number each, by name.
        predictive: predictions for the labelled data.
        ood_predictive: predictions for the out-of-distribution data, if there were any.
        by_label: for multi-label classification the metrics of each label, for token
            classification those of each type of entity.
    """

    metrics: dict[str, float]
    predictive: Predictive
    ood_predictive: Predictive | None = None
    by_label: dict[str, dict[str, float]] | None = None

    def to_dict(self) -> dict[str, float]:
        """The metrics as plain floats, for JSON."""
        return {name: float(value) for name, value in self.metrics.items()}

    def __str__(self) -> str:
        width = max(map(len, self.metrics), default=0)
        return "\n".join(f"{name:<{width}}  {value:.4f}" for name, value in self.metrics.items())


def measure(predictive: Predictive, ood: Predictive | None = None) -> Evaluation:
    """The metrics of the prediction's kind.

    Args:
        predictive: predictions for labelled inputs.
        ood: predictions of the same classifier for inputs that are not of the task at all.

    Raises:
        BaraError: labels are missing, or a regression has an `ood`.
    """
    if isinstance(predictive, ClassificationPredictive):
        if ood is None or isinstance(ood, ClassificationPredictive):
            return Evaluation(classification_metrics(predictive, ood=ood), predictive, ood)
    elif ood is None:
        return _without_ood(predictive)
    raise BaraError("OOD detection is measured for classification only: leave out ood.")


def _without_ood(predictive: Predictive) -> Evaluation:
    if isinstance(predictive, MultiLabelPredictive):
        metrics = multi_label_metrics(predictive)
        return Evaluation(metrics, predictive, by_label=label_scores(predictive))
    if isinstance(predictive, TokenPredictive):
        metrics = classification_metrics(predictive.labelled) | token_metrics(predictive)
        return Evaluation(metrics, predictive, by_label=tag_scores(predictive))
    if isinstance(predictive, SpanPredictive):
        return Evaluation(span_metrics(predictive), predictive)
    assert isinstance(predictive, RegressionPredictive)
    return Evaluation(regression_metrics(predictive), predictive)


def classification_metrics(
    predictive: ClassificationPredictive,
    labels: Tensor | None = None,
    ood: ClassificationPredictive | None = None,
) -> dict[str, float]:
    """Metrics of the mixture over draws.

    Args:
        predictive: predictions for n inputs.
        labels: (n,) reference classes; ``predictive.labels`` if None.
        ood: predictions of the same model for inputs that are not of the task at all.

    Returns:
        - ``accuracy``: share of inputs whose most probable class is the label.
        - ``nll``: mean negative log-likelihood of the label, nats.
        - ``ece``: expected calibration error of the predicted class's probability, 15 bins of
          equal width (Guo et al. 2017, arXiv 1706.04599).
        - ``brier``: squared distance between probabilities and the one-hot label, summed over
          classes, so between 0 and 2.
        - ``aurc``: area under the risk–coverage curve (see `risk_coverage`) of the error rate,
          uncertainty = 1 - largest probability.
        - with ``ood``, score = predictive entropy, out-of-distribution = positive: ``ood_auroc``,
          and ``ood_fpr95``, the share of in-distribution inputs taken for OOD at the highest
          threshold that finds at least 95% of the OOD inputs.

    Raises:
        BaraError: no inputs, no labels, or a label that is not a class.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    labels = _class_labels(predictive, labels)
    probs = predictive.probs
    uncertainty, errors = _selection(predictive, labels)
    metrics = {
        "accuracy": 1 - errors.mean().item(),
        "nll": F.nll_loss(predictive.log_probs, labels).item(),
        "ece": multiclass_calibration_error(
            below_one(probs), labels, num_classes=predictive.num_classes, n_bins=NUM_BINS
        ).item(),
        "brier": (probs - F.one_hot(labels, predictive.num_classes)).square().sum(-1).mean().item(),
        "aurc": risk_coverage(uncertainty, errors)[1].mean().item(),
    }
    if ood is not None:
        metrics |= _ood_metrics(predictive.total_uncertainty, ood.total_uncertainty)
    return metrics


def regression_metrics(
    predictive: RegressionPredictive, labels: Tensor | None = None
) -> dict[str, float]:
    """Metrics of the Gaussian mixture over draws.

    Args:
        predictive: predictions for n inputs.
        labels: (n,) targets; ``predictive.labels`` if None.

    Returns:
        ``rmse``, ``mae`` of the mean, in the unit of the target; ``nll``, mean negative
        log-density; ``coverage_90``, share of targets inside the central 90% interval (0.9 is
        calibrated); ``aurc``, area under the risk–coverage curve of the squared error,
        uncertainty = variance; ``spearman``, rank correlation of variance and absolute error (0
        if all variances are equal).

    Raises:
        BaraError: no inputs, no labels, NaN or infinity among them, or a noise variance of 0.
    """
    from torchmetrics.functional import spearman_corrcoef

    labels = _targets(predictive, labels)
    uncertainty, squared_error = _selection(predictive, labels)
    lower, upper = predictive.interval(0.9)
    return {
        "rmse": squared_error.mean().sqrt().item(),
        "mae": squared_error.sqrt().mean().item(),
        "nll": -predictive.log_prob(labels).mean().item(),
        "coverage_90": ((lower <= labels) & (labels <= upper)).double().mean().item(),
        "aurc": risk_coverage(uncertainty, squared_error)[1].mean().item(),
        "spearman": spearman_corrcoef(uncertainty, squared_error.sqrt()).item(),
    }


def reliability(
    probs: Tensor, labels: Tensor, bins: int = NUM_BINS
) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence and accuracy of the predicted class, in ``bins`` of equal width on [0, 1].

    Args:
        probs: (n, C) probabilities.
        labels: (n,) reference classes.

    Returns:
        (bins,) mean confidences, accuracies and counts; the former two NaN where the count is 0.
    """
    confidence, prediction = below_one(probs).max(-1)
    index = torch.bucketize(confidence, torch.linspace(0, 1, bins + 1), right=True) - 1
    count = index.bincount(minlength=bins)

    def mean(values: Tensor) -> Tensor:
        return index.bincount(values.double(), minlength=bins) / count

    return mean(confidence), mean(prediction == labels), count


def selective_risk(predictive: Predictive) -> tuple[Tensor, Tensor]:
    """The risk–coverage curve of n labelled predictions, (n,) each, as `risk_coverage` returns it:
    of the error rate, or for regression of the squared error.

    Raises:
        BaraError: as the metrics do.
    """
    return risk_coverage(*selection(predictive))


def selection(predictive: Predictive) -> tuple[Tensor, Tensor]:
    """(n,) uncertainties and (n,) losses of labelled predictions, by which an input is answered or
    not: 1 - probability of the prediction and errors, or for regression variances and squared
    errors. A prediction of several labels or words is right if all of them are.

    Raises:
        BaraError: as the metrics do.
    """
    if isinstance(predictive, ClassificationPredictive):
        return _selection(predictive, _class_labels(predictive, None))
    if not isinstance(predictive, RegressionPredictive):
        return task_selection(predictive)
    return _selection(predictive, _targets(predictive, None))


def _selection(
    predictive: ClassificationPredictive | RegressionPredictive, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """(n,) uncertainties and (n,) float64 losses that selective prediction is judged by."""
    if isinstance(predictive, ClassificationPredictive):
        return 1 - predictive.probs.amax(-1), (predictive.prediction != labels).double()
    return predictive.variance, (predictive.mean - labels).double().square()


def _ood_metrics(inside: Tensor, outside: Tensor) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score, roc_curve

    if len(outside) == 0:
        raise BaraError("the out-of-distribution data has no inputs")
    is_outside = torch.cat([torch.zeros_like(inside), torch.ones_like(outside)]).numpy()
    score = torch.cat([inside, outside]).numpy()
    false_positives, true_positives, _ = roc_curve(is_outside, score, drop_intermediate=False)
    return {
        "ood_auroc": float(roc_auc_score(is_outside, score)),
        "ood_fpr95": float(false_positives[(true_positives >= 0.95).argmax()]),
    }


def _labels(predictive: Predictive, labels: Tensor | None, num_inputs: int) -> Tensor:
    labels = predictive.labels if labels is None else labels
    if labels is None:
        raise BaraError("metrics need labels: the data has no label column and none were given")
    if num_inputs == 0:
        raise BaraError("the data has no inputs: there is nothing to evaluate")
    if tuple(labels.shape) != (num_inputs,):
        raise BaraError(
            f"labels must be one for each of the {num_inputs} inputs, "
            f"not of the shape {tuple(labels.shape)}"
        )
    return labels


def _class_labels(predictive: ClassificationPredictive, labels: Tensor | None) -> Tensor:
    labels = _labels(predictive, labels, predictive.log_probs_draws.shape[1])
    check_classes(labels, predictive.num_classes)
    return labels.long()


def _targets(predictive: RegressionPredictive, labels: Tensor | None) -> Tensor:
    labels = _labels(predictive, labels, predictive.mean_draws.shape[1]).to(predictive.mean.dtype)
    if bad := int((~labels.isfinite()).sum()):
        raise BaraError(f"{bad} of the {len(labels)} targets are NaN or infinite")
    return labels
