"""Prediction sets and intervals that hold the truth as often as promised (split conformal)."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from bara.cards.adapter_files import CONFORMAL_FILE
from bara.errors import BaraError
from bara.evaluation.abstention import require_conditions
from bara.evaluation.metrics import selection
from bara.files import atomic_write_bytes
from bara.prediction.predictive import (
    ClassificationPredictive,
    Predictive,
    RegressionPredictive,
)

FILE = CONFORMAL_FILE
CONDITIONS = "conditions"
KINDS = "conformal sets and intervals are for classification, multiple choice and regression"


@dataclass(frozen=True, eq=False)
class Conformal:
    """Held-out predictions by which sets and intervals of any coverage are made, with MAPIE.

    A set or an interval holds the truth with a probability of at least the coverage, over the
    calibration data and the new input together, as long as they are exchangeable, whatever the
    model (Vovk et al. 2005; Lei et al. 2018, arXiv 1604.04173).

    Attributes:
        probs: (n, C) probabilities of the calibration inputs; None for regression.
        labels: (n,) their classes; None for regression.
        residuals: (n,) error over standard deviation of the mixture; None for classification.
    """

    probs: Tensor | None = None
    labels: Tensor | None = None
    residuals: Tensor | None = None

    def __len__(self) -> int:
        """Number of calibration inputs."""
        return len(next(part for part in (self.labels, self.residuals) if part is not None))

    def sets(self, predictive: ClassificationPredictive, coverage: float = 0.9) -> Tensor:
        """Prediction sets: the classes that are probable enough (Sadinle et al. 2019).

        A set may hold several classes, and none where no class is as probable as true ones
        usually are.

        Args:
            predictive: of new inputs, by the same model, draws and seed.
            coverage: in (0, 1).

        Returns:
            (n, C) bool.

        Raises:
            BaraError: the calibration was of a regression, a coverage outside (0, 1), or too few
                calibration inputs for it.
        """
        if self.probs is None or not isinstance(predictive, ClassificationPredictive):
            raise BaraError("prediction sets are for classification; a regression has intervals")
        self.check(coverage)
        from mapie.classification import SplitConformalClassifier

        assert self.labels is not None
        # questions may have more choices than those of the calibration, or fewer
        width = max(predictive.num_classes, self.probs.shape[1])
        known, new = (F.pad(p, (0, width - p.shape[1])) for p in (self.probs, _probs(predictive)))
        mapie = SplitConformalClassifier(_Ready(width), confidence_level=coverage)
        with warnings.catch_warnings():  # of classes that no calibration input has
            warnings.simplefilter("ignore")
            mapie.conformalize(known.numpy(), self.labels.numpy())
        found = torch.from_numpy(mapie.predict_set(new.numpy())[1][..., 0])
        return found[:, : predictive.num_classes] & predictive.log_probs.cpu().isfinite()

    def intervals(
        self, predictive: RegressionPredictive, coverage: float = 0.9
    ) -> tuple[Tensor, Tensor]:
        """Intervals around the mean, as many standard deviations wide as held-out errors were.

        Args:
            predictive: of new inputs, by the same model, draws and seed.
            coverage: in (0, 1).

        Returns:
            (n,) lower and (n,) upper ends, float64, in the unit of the target.

        Raises:
            BaraError: the calibration was of a classification, a coverage outside (0, 1), or too
                few calibration inputs for it.
        """
        if self.residuals is None or not isinstance(predictive, RegressionPredictive):
            raise BaraError("intervals are for regression; a classification has prediction sets")
        self.check(coverage)
        from mapie.regression import SplitConformalRegressor

        zero = torch.zeros(len(self), 1).numpy()  # the point prediction of a residual
        mapie = SplitConformalRegressor(_Ready(1), confidence_level=coverage)
        mapie.conformalize(zero, self.residuals.numpy())
        width = float(mapie.predict_interval(zero[:1])[1][0, 1, 0])
        mean, std = predictive.mean.double(), _std(predictive)
        return mean - width * std, mean + width * std

    def to_records(self, predictive: Predictive, coverage: float = 0.9) -> list[dict[str, Any]]:
        """One dict per input, for JSON: the names in its `prediction_set`, or its `interval`.

        Raises:
            BaraError: as `sets` and `intervals` do.
        """
        if isinstance(predictive, RegressionPredictive):
            ends = torch.stack(self.intervals(predictive, coverage), dim=1)
            return [{"interval": pair} for pair in ends.tolist()]
        if not isinstance(predictive, ClassificationPredictive):
            raise BaraError(KINDS)
        sets = self.sets(predictive, coverage).tolist()
        names = predictive.label_names or [str(c) for c in range(predictive.num_classes)]
        return [{"prediction_set": list(compress(names, inside))} for inside in sets]

    def check(self, coverage: float) -> None:
        """Raises BaraError for a coverage outside (0, 1), or one that needs more calibration."""
        if not 0 < coverage < 1:
            raise BaraError(f"the coverage must lie between 0 and 1, not {coverage!r} (--coverage)")
        needed = math.ceil(max(1 / (1 - coverage), 1 / coverage) - 1e-9)
        if len(self) < needed:
            raise BaraError(
                f"{len(self)} labelled rows cannot promise a coverage of {coverage:g}: calibrate "
                f"with at least {needed}, better with hundreds, or ask for less (--coverage)"
            )


class _Ready:
    """To MAPIE a fitted estimator: what it predicts is there already, as its input."""

    def __init__(self, width: int) -> None:
        self.classes_ = list(range(width))
        self.n_features_in_ = width

    def fit(self, inputs: Any, targets: Any) -> _Ready:
        """Never called; scikit-learn knows an estimator by it."""
        raise NotImplementedError

    def predict_proba(self, inputs: Any) -> Any:
        """The rows."""
        return inputs

    def predict(self, inputs: Any) -> Any:
        """Each row's class, or its only number."""
        return inputs[:, 0] if self.n_features_in_ == 1 else inputs.argmax(1)


def calibrate_conformal(predictive: Predictive) -> Conformal:
    """Calibrates prediction sets or intervals on held-out data.

    Args:
        predictive: labelled predictions of data that was not trained on.

    Returns:
        What gives sets (classification) or intervals (regression) of any coverage.

    Raises:
        BaraError: predictions of another kind, no labels, a label that is no class, NaN or
            infinite, or for regression a variance of 0.
    """
    if not isinstance(predictive, ClassificationPredictive | RegressionPredictive):
        raise BaraError(KINDS)
    selection(predictive)  # checks the labels
    labels = predictive.labels
    assert labels is not None
    if isinstance(predictive, ClassificationPredictive):
        return Conformal(probs=_probs(predictive), labels=labels.long().cpu())
    error = labels.double().cpu() - predictive.mean.double().cpu()
    return Conformal(residuals=error / _std(predictive).cpu())


def _probs(predictive: ClassificationPredictive) -> Tensor:
    probs = predictive.probs.double().cpu()
    return probs / probs.sum(-1, keepdim=True)


def _std(predictive: RegressionPredictive) -> Tensor:
    std = predictive.variance.double().sqrt()
    if (std == 0).any():
        raise BaraError("a variance of 0 has no interval: give noise_variance a value > 0")
    return std


def save_conformal(folder: str | Path, conformal: Conformal, **conditions: Any) -> None:
    """Writes a calibration beside an adapter, with what it was made under (`num_draws`, ...).

    The file holds the calibration rows' probabilities and labels (or residuals), not their texts.
    """
    tensors = {name: part for name, part in vars(conformal).items() if part is not None}
    content = save(tensors, metadata={CONDITIONS: json.dumps(conditions)})
    atomic_write_bytes(Path(folder) / FILE, content)


def load_conformal(folder: str | Path, **conditions: Any) -> Conformal:
    """The calibration that `save_conformal` wrote, if it was made under the same conditions.

    Raises:
        BaraError: there is none, it was made under others, or the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise BaraError(
            f"{folder} has no conformal calibration: make one with labelled data that was not "
            f"trained on, bara evaluate {folder} --data LABELLED --calibrate-conformal"
        )
    try:
        with safe_open(path, framework="pt") as file:
            given = dict(json.loads(file.metadata()[CONDITIONS]))
            conformal = Conformal(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  (no dictionary)
        _require_whole(conformal)
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise BaraError(f"{path} is damaged: remove it and calibrate again") from error
    require_conditions("the conformal calibration was made", given, conditions)
    return conformal


def _require_whole(conformal: Conformal) -> None:
    """Raises ValueError for tensors that `calibrate_conformal` does not make."""
    probs, labels, residuals = conformal.probs, conformal.labels, conformal.residuals
    if residuals is not None:
        whole = (
            probs is labels is None
            and (residuals.dim(), residuals.dtype) == (1, torch.float64)
            and bool(residuals.isfinite().all())
        )
    else:
        whole = (
            probs is not None
            and labels is not None
            and (probs.dim(), probs.dtype, labels.dtype) == (2, torch.float64, torch.int64)
            and labels.shape == probs.shape[:1]
            and torch.allclose(probs.sum(1), torch.ones_like(probs[:, 0]))
            and bool(((labels >= 0) & (labels < probs.shape[1])).all())
        )
    if not whole:
        raise ValueError("not a calibration")
