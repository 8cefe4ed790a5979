"""The predictive distribution of multi-label classification: any number of labels per input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bara.errors import BaraError
from bara.prediction.predictive import Predictive, check_not_nan


@dataclass(frozen=True, eq=False)
class MultiLabelPredictive(Predictive):
    """Probabilities of L labels, each there or not, for n inputs under S posterior draws.

    Under one draw labels are independent of each other; in the mixture they are not. Uncertainties
    are per label, in nats, with total = aleatoric + epistemic.

    Attributes:
        logits_draws: (S, n, L) log-odds of every label.
        labels: (n, L) reference, 1 for a label that is there and 0 for others, or None.
        label_names: the L names, or None.

    Raises:
        BaraError: shapes that do not fit, NaN, labels that are not 0 or 1, or names that are too
            few, too many or repeated.
    """

    logits_draws: Tensor
    labels: Tensor | None = None
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.logits_draws.shape)
        if len(shape) != 3 or shape[0] < 1 or shape[2] < 1:
            raise BaraError(
                "logits_draws must have the shape (draws, inputs, labels) with at least one draw "
                f"and one label, not {shape}"
            )
        check_not_nan(self.logits_draws)
        if self.labels is not None:
            if tuple(self.labels.shape) != shape[1:]:
                raise BaraError(
                    f"labels must have the shape (inputs, labels), {shape[1:]}, "
                    f"not {tuple(self.labels.shape)}"
                )
            if not ((self.labels == 0) | (self.labels == 1)).all():
                raise BaraError("the labels of a multi-label classification must be 0 or 1")
        if self.label_names is not None and len(set(self.label_names)) != shape[2]:
            raise BaraError(
                f"label_names must be {shape[2]} different names, not {list(self.label_names)}"
            )

    @property
    def num_draws(self) -> int:
        """S."""
        return self.logits_draws.shape[0]

    @property
    def num_labels(self) -> int:
        """L."""
        return self.logits_draws.shape[2]

    @property
    def names(self) -> tuple[str, ...]:
        """The L names; "0", "1", … if there are none."""
        return self.label_names or tuple(str(label) for label in range(self.num_labels))

    @property
    def probs(self) -> Tensor:
        """(n, L) probability that each label is there, the mean over draws."""
        return self.logits_draws.sigmoid().mean(0)

    @property
    def prediction(self) -> Tensor:
        """(n, L) which labels are more probably there than not, boolean."""
        return self.probs > 0.5

    @property
    def confidence(self) -> Tensor:
        """(n,) probability that all labels of an input are as predicted."""
        return self.log_prob(self.prediction).exp()

    def log_prob(self, labels: Tensor) -> Tensor:
        """(n,) log-probability of all labels of an input together, under the mixture.

        Args:
            labels: (n, L), 0 or 1.
        """
        return self._log_prob_draws(labels).sum(-1).logsumexp(0) - math.log(self.num_draws)

    def label_log_prob(self, labels: Tensor) -> Tensor:
        """(n, L) log-probability of each label alone, under the mixture.

        Args:
            labels: (n, L), 0 or 1.
        """
        return self._log_prob_draws(labels).logsumexp(0) - math.log(self.num_draws)

    def _log_prob_draws(self, labels: Tensor) -> Tensor:
        return logsigmoid(torch.where(labels.bool(), self.logits_draws, -self.logits_draws))

    @property
    def total_uncertainty(self) -> Tensor:
        """(n, L) entropy of each label's mean probability."""
        return _entropy(self.probs)

    @property
    def aleatoric_uncertainty(self) -> Tensor:
        """(n, L) mean over draws of each label's entropy."""
        return _entropy(self.logits_draws.sigmoid()).mean(0)

    @property
    def epistemic_uncertainty(self) -> Tensor:
        """(n, L) mutual information between each label and the draw; never negative."""
        return (self.total_uncertainty - self.aleatoric_uncertainty).clamp(min=0)

    def select(self, index: Tensor | slice | Sequence[int]) -> MultiLabelPredictive:
        """The inputs at ``index``: a slice, positions, or a (n,) boolean mask."""
        labels = None if self.labels is None else self.labels[index]
        return MultiLabelPredictive(self.logits_draws[:, index], labels, self.label_names)

    def to_records(self) -> list[dict[str, Any]]:
        """One dict of plain Python values per input, for JSON.

        Returns:
            ``{"prediction": [names], "confidence": p, "labels": {name: {"probability": p,
            "total": …, "aleatoric": …, "epistemic": …}}}``, uncertainties in nats.
        """
        records = []
        names, confidence = self.names, self.confidence.tolist()
        for row, labels in enumerate(self._by_label()):
            predicted = [name for name in names if labels[name]["probability"] > 0.5]
            records.append(
                {"prediction": predicted, "confidence": confidence[row], "labels": labels}
            )
        return records

    def _by_label(self) -> list[dict[str, dict[str, float]]]:
        columns = {
            "probability": self.probs,
            "total": self.total_uncertainty,
            "aleatoric": self.aleatoric_uncertainty,
            "epistemic": self.epistemic_uncertainty,
        }
        table = torch.stack(list(columns.values()), dim=-1).tolist()  # (n, L, 4)
        return [
            {
                name: dict(zip(columns, values, strict=True))
                for name, values in zip(self.names, row, strict=True)
            }
            for row in table
        ]

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for number, labels in enumerate(self._by_label()):
            for column, (name, values) in enumerate(labels.items()):
                row = {"input": number, "name": name, "prediction": values["probability"] > 0.5}
                row |= values
                if self.labels is not None:
                    row["label"] = bool(self.labels[number, column])
                rows.append(row)
        return rows


def _entropy(probs: Tensor) -> Tensor:
    return torch.special.entr(probs) + torch.special.entr(1 - probs)
