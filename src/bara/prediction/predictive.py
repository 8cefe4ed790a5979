"""Predictive distributions: a mixture over posterior draws, and what follows from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Normal

from bara.draws.blocks import log_mean_exp
from bara.errors import BaraError

if TYPE_CHECKING:
    from pandas import DataFrame


class Predictive(ABC):
    """What a model predicts for n inputs under S draws of its posterior.

    Attributes:
        labels: what is right for each input, as far as it is known.
    """

    labels: Any

    @property
    @abstractmethod
    def num_draws(self) -> int:
        """S."""

    @abstractmethod
    def select(self, index: Any) -> Predictive:
        """The inputs at ``index``: a slice, positions, or a (n,) boolean mask."""

    @abstractmethod
    def to_records(self) -> list[dict[str, Any]]:
        """One dict of plain Python values per input, for JSON."""

    def to_frame(self) -> DataFrame:
        """A pandas table: a row for each input, or for each word or label of one.

        Its columns are the fields of `to_records`, nested ones with a dot between the names, and
        `label`, what is right, where that is known.
        """
        from pandas import json_normalize  # takes a second to import

        return json_normalize(self._rows())

    @abstractmethod
    def _rows(self) -> list[dict[str, Any]]:
        """The rows of the table."""


@dataclass(frozen=True, eq=False)
class ClassificationPredictive(Predictive):
    """Class probabilities of n inputs under S posterior draws.

    Uncertainties are in nats and split as in Depeweg et al. (2018, arXiv 1710.07283):
    total = aleatoric + epistemic.

    Attributes:
        log_probs_draws: (S, n, C) log-probabilities, float32.
        labels: (n,) reference labels, long, or None.
        label_names: the C names of the classes, or None.

    Raises:
        BaraError: shapes that do not fit, NaN, or names that are too few, too many or repeated.
    """

    log_probs_draws: Tensor
    labels: Tensor | None = None
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.log_probs_draws.shape)
        if len(shape) != 3 or shape[0] < 1 or shape[2] < 2:
            raise BaraError(
                "log_probs_draws must have the shape (draws, inputs, classes) with at least one "
                f"draw and two classes, not {shape}"
            )
        check_not_nan(self.log_probs_draws)
        _check_labels_shape(self.labels, shape[1])
        if self.label_names is not None and len(set(self.label_names)) != shape[2]:
            raise BaraError(
                f"label_names must be {shape[2]} different names, one for each class, "
                f"not {list(self.label_names)}"
            )

    @property
    def num_draws(self) -> int:
        """S."""
        return self.log_probs_draws.shape[0]

    @property
    def num_classes(self) -> int:
        """C."""
        return self.log_probs_draws.shape[2]

    @property
    def log_probs(self) -> Tensor:
        """(n, C) logarithm of the mean probabilities."""
        return log_mean_exp(self.log_probs_draws)

    @property
    def probs(self) -> Tensor:
        """(n, C) probabilities, the mean over draws."""
        return self.log_probs.exp().clamp(max=1)

    @property
    def prediction(self) -> Tensor:
        """(n,) index of the most probable class."""
        return self.log_probs.argmax(-1)

    @property
    def confidence(self) -> Tensor:
        """(n,) probability of the prediction."""
        return self.probs.amax(-1)

    @property
    def total_uncertainty(self) -> Tensor:
        """(n,) entropy of the mean probabilities."""
        return torch.special.entr(self.probs).sum(-1)

    @property
    def aleatoric_uncertainty(self) -> Tensor:
        """(n,) mean over draws of the entropy: what more training data would not remove."""
        return torch.special.entr(self.log_probs_draws.exp()).sum(-1).mean(0)

    @property
    def epistemic_uncertainty(self) -> Tensor:
        """(n,) mutual information between the class and the draw; never negative."""
        return (self.total_uncertainty - self.aleatoric_uncertainty).clamp(min=0)

    def log_prob(self, labels: Tensor) -> Tensor:
        """(n,) log-probability of the classes ``labels`` (n,), under the mixture."""
        return self.log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)

    def tempered(self, temperature: float) -> ClassificationPredictive:
        """Every draw's probabilities to the power of 1 / temperature, normalised; float64."""
        cooled = self.log_probs_draws.double() / temperature
        return replace(self, log_probs_draws=cooled.log_softmax(-1))

    def select(self, index: Tensor | slice | Sequence[int]) -> ClassificationPredictive:
        """The inputs at ``index``: a slice, positions, or a (n,) boolean mask."""
        labels = None if self.labels is None else self.labels[index]
        return ClassificationPredictive(self.log_probs_draws[:, index], labels, self.label_names)

    def to_records(self) -> list[dict[str, Any]]:
        """One dict of plain Python values per input, for JSON.

        Returns:
            ``{"prediction": name, "probabilities": {name: p}, "total": …, "aleatoric": …,
            "epistemic": …}``, uncertainties in nats.
        """
        names = self.label_names or [str(c) for c in range(self.num_classes)]
        rows = zip(
            self.prediction.tolist(),
            self.probs.tolist(),
            self.total_uncertainty.tolist(),
            self.aleatoric_uncertainty.tolist(),
            self.epistemic_uncertainty.tolist(),
            strict=True,
        )
        return [
            {
                "prediction": names[prediction],
                "probabilities": dict(zip(names, probs, strict=True)),
                "total": total,
                "aleatoric": aleatoric,
                "epistemic": epistemic,
            }
            for prediction, probs, total, aleatoric, epistemic in rows
        ]

    def _rows(self) -> list[dict[str, Any]]:
        if self.labels is None:
            return self.to_records()
        names = self.label_names or [str(c) for c in range(self.num_classes)]
        known = [names[i] if 0 <= i < len(names) else None for i in self.labels.tolist()]
        return with_labels(self.to_records(), known)


@dataclass(frozen=True, eq=False)
class RegressionPredictive(Predictive):
    """A Gaussian for each of n inputs and S posterior draws: together a mixture of Gaussians.

    Attributes:
        mean_draws: (S, n) means, in the unit of the target; float64 where a model's targets were
            standardised.
        variance_draws: (S, n) variances of the noise, in that unit squared; 0 where no noise
            model is known (there is then no density, see `log_prob`).
        labels: (n,) targets, float, or None.

    Raises:
        BaraError: shapes that do not fit, NaN, or a negative variance.
    """

    mean_draws: Tensor
    variance_draws: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.mean_draws.shape)
        if len(shape) != 2 or shape[0] < 1 or self.variance_draws.shape != self.mean_draws.shape:
            raise BaraError(
                "mean_draws and variance_draws must both have the shape (draws, inputs), "
                f"not {shape} and {tuple(self.variance_draws.shape)}"
            )
        check_not_nan(self.mean_draws)
        check_not_nan(self.variance_draws)
        if (self.variance_draws < 0).any():
            raise BaraError("variance_draws has negative values: variances are 0 or more")
        _check_labels_shape(self.labels, shape[1])

    @property
    def num_draws(self) -> int:
        """S."""
        return self.mean_draws.shape[0]

    @property
    def mean(self) -> Tensor:
        """(n,) mean of the mixture."""
        return self.mean_draws.mean(0)

    @property
    def aleatoric_variance(self) -> Tensor:
        """(n,) mean over draws of the noise variance."""
        return self.variance_draws.mean(0)

    @property
    def epistemic_variance(self) -> Tensor:
        """(n,) variance of the means over the draws (divided by S, not S - 1)."""
        return self.mean_draws.var(0, correction=0)

    @property
    def variance(self) -> Tensor:
        """(n,) variance of the mixture: aleatoric + epistemic, by the law of total variance."""
        return self.aleatoric_variance + self.epistemic_variance

    def log_prob(self, targets: Tensor) -> Tensor:
        """(n,) log-density of the mixture at the (n,) ``targets``.

        Raises:
            BaraError: a noise variance is 0.
        """
        if (self.variance_draws == 0).any():
            raise BaraError("a noise variance of 0 has no density: give noise_variance a value > 0")
        components = Normal(self.mean_draws, self.variance_draws.sqrt())
        return log_mean_exp(components.log_prob(targets))

    def cdf(self, values: Tensor) -> Tensor:
        """(n,) probability that each target is at most ``values`` (n,); float64."""
        # A floor makes a component without noise the step function it is.
        scale = self.variance_draws.double().sqrt().clamp(min=1e-150)
        return torch.special.ndtr((values - self.mean_draws.double()) / scale).mean(0)

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central interval of the mixture: (n,) lower and upper ends, in the unit of the target.

        Args:
            level: probability inside; as much is left out below as above.

        Raises:
            BaraError: ``level`` is not strictly between 0 and 1.
        """
        if not 0 < level < 1:
            raise BaraError(f"level must lie between 0 and 1, not {level}")
        return self._quantile((1 - level) / 2), self._quantile((1 + level) / 2)

    def _quantile(self, probability: float) -> Tensor:
        # The mixture's quantile lies between the smallest and the largest of its components'.
        z = torch.special.ndtri(torch.tensor(probability, dtype=torch.float64))
        components = self.mean_draws.double() + z * self.variance_draws.double().sqrt()
        low, high = components.amin(0), components.amax(0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).to(self.mean_draws.dtype)

    def tempered(self, temperature: float) -> RegressionPredictive:
        """Every draw's variance times the temperature; float64."""
        variances = self.variance_draws.double() * temperature
        return replace(self, mean_draws=self.mean_draws.double(), variance_draws=variances)

    def select(self, index: Tensor | slice | Sequence[int]) -> RegressionPredictive:
        """The inputs at ``index``: a slice, positions, or a (n,) boolean mask."""
        labels = None if self.labels is None else self.labels[index]
        return RegressionPredictive(
            self.mean_draws[:, index], self.variance_draws[:, index], labels
        )

    def to_records(self) -> list[dict[str, Any]]:
        """One dict of plain Python values per input, for JSON.

        Returns:
            ``{"prediction": mean, "lower": …, "upper": …, "total": …, "aleatoric": …,
            "epistemic": …}``: the 90% interval, and variances.
        """
        columns = {
            "prediction": self.mean,
            **dict(zip(("lower", "upper"), self.interval(0.9), strict=True)),
            "total": self.variance,
            "aleatoric": self.aleatoric_variance,
            "epistemic": self.epistemic_variance,
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def _rows(self) -> list[dict[str, Any]]:
        records = self.to_records()
        return records if self.labels is None else with_labels(records, self.labels.tolist())


def with_labels(records: list[dict[str, Any]], labels: Sequence[Any]) -> list[dict[str, Any]]:
    """The records, each with its label."""
    return [{**record, "label": label} for record, label in zip(records, labels, strict=True)]


def check_not_nan(draws: Tensor) -> None:
    """Raises BaraError if outputs (S, n, ...) are NaN for an input, with its number."""
    bad = draws.isnan().flatten(2).any(-1) if draws.dim() == 3 else draws.isnan()
    if bad.any():
        inputs = bad.any(0).nonzero().flatten().tolist()
        raise BaraError(
            f"the model's output is NaN for {len(inputs)} of {bad.shape[1]} inputs (the first is "
            f"number {inputs[0]}): look for NaN in the data or in the adapter's weights"
        )


def check_classes(labels: Tensor, num_classes: int) -> None:
    """Raises BaraError if labels are no classes: fractions, or none of 0 to num_classes - 1."""
    if labels.is_floating_point():
        raise BaraError("the labels of a classification must be whole numbers, the classes")
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise BaraError(
            f"label {outside[0].item()} is not a class: the model knows 0 to {num_classes - 1}"
        )


def _check_labels_shape(labels: Tensor | None, num_inputs: int) -> None:
    if labels is not None and tuple(labels.shape) != (num_inputs,):
        raise BaraError(
            f"labels must be one for each of the {num_inputs} inputs, "
            f"not of the shape {tuple(labels.shape)}"
        )
