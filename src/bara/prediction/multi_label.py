"""The predictive distribution of multi-label classification: any number of labels per input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from bara.draws.blocks import log_mean_exp
from bara.errors import BaraError
from bara.prediction.predictive import Predictive, check_not_nan

NUM_SETS = 1024
"""Sets of labels that a joint entropy is summed over: all of them, or as many drawn ones."""
LARGEST_LOGIT = 700.0
"""Where exp still has a value in float64: a label is certain long before."""


@dataclass(frozen=True, eq=False)
class MultiLabelPredictive(Predictive):
    """Probabilities of L labels, each there or not, for n inputs under S posterior draws.

    Under one draw labels are independent of each other; in the mixture they are not. Uncertainties
    are in nats, with total = aleatoric + epistemic: of each label alone, and `joint_` ones of all
    labels of an input together.

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
        return log_mean_exp(self._log_prob_draws(labels).sum(-1))

    def label_log_prob(self, labels: Tensor) -> Tensor:
        """(n, L) log-probability of each label alone, under the mixture.

        Args:
            labels: (n, L), 0 or 1.
        """
        return log_mean_exp(self._log_prob_draws(labels))

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

    @property
    def joint_total_uncertainty(self) -> Tensor:
        """(n,) entropy of all labels of an input together."""
        return self.joint_aleatoric_uncertainty + self.joint_epistemic_uncertainty

    @property
    def joint_aleatoric_uncertainty(self) -> Tensor:
        """(n,) mean over draws of the entropy of all labels together: a sum over the labels, which
        are independent under a draw."""
        return self.aleatoric_uncertainty.sum(-1)

    @cached_property
    def joint_epistemic_uncertainty(self) -> Tensor:
        """(n,) mutual information between all labels of an input together and the draw.

        Exact for up to 10 labels, over all 2^L sets of them. For more it is the mean of
        log p(set | draw) - log p(set) over about 1,024 sets that are drawn from the draws, always
        from the same random numbers: unbiased, but where it would be negative and is 0.
        """
        logits = self.logits_draws.double().clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        noise = None
        if 2**self.num_labels > NUM_SETS:
            shape = (self.num_draws, math.ceil(NUM_SETS / self.num_draws), self.num_labels)
            generator = torch.Generator().manual_seed(0)
            noise = torch.rand(shape, generator=generator).to(logits)
        found = [_joint_information(of_input, noise) for of_input in logits.unbind(1)]
        return torch.tensor(found).to(self.logits_draws).clamp(min=0)

    def tempered(self, temperature: float) -> MultiLabelPredictive:
        """Every draw's logits over the temperature; float64."""
        return replace(self, logits_draws=self.logits_draws.double() / temperature)

    def select(self, index: Tensor | slice | Sequence[int]) -> MultiLabelPredictive:
        """The inputs at ``index``: a slice, positions, or a (n,) boolean mask."""
        labels = None if self.labels is None else self.labels[index]
        return MultiLabelPredictive(self.logits_draws[:, index], labels, self.label_names)

    def to_records(self) -> list[dict[str, Any]]:
        """One dict of plain Python values per input, for JSON.

        Returns:
            ``{"prediction": [names], "confidence": p, "total": …, "aleatoric": …, "epistemic": …,
            "labels": {name: {"probability": p, "total": …, "aleatoric": …, "epistemic": …}}}``,
            uncertainties in nats, of all labels together and of each.
        """
        columns = {
            "confidence": self.confidence,
            "total": self.joint_total_uncertainty,
            "aleatoric": self.joint_aleatoric_uncertainty,
            "epistemic": self.joint_epistemic_uncertainty,
        }
        together = torch.stack(list(columns.values()), dim=-1).tolist()  # (n, 4)
        records = []
        for values, labels in zip(together, self._by_label(), strict=True):
            predicted = [name for name in self.names if labels[name]["probability"] > 0.5]
            whole = dict(zip(columns, values, strict=True))
            records.append({"prediction": predicted, **whole, "labels": labels})
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


def _joint_information(logits: Tensor, noise: Tensor | None) -> float:
    """Mutual information, nats, between the draw and a set of labels that are independent under it.

    Args:
        logits: (S, L) log-odds of the labels.
        noise: (S, M, L) uniform numbers that draw M sets from each draw; None sums over all sets.
    """
    if noise is None:
        sets = torch.cartesian_prod(*torch.tensor([[0.0, 1.0]] * logits.shape[1]).to(logits))
        sets = sets.view(1, -1, logits.shape[1])
    else:
        sets = (noise < logits.sigmoid().unsqueeze(1)).to(logits)
    log_probs = sets @ logits.T - softplus(logits).sum(-1)  # (1 or S, M, S)
    gains = log_probs - log_probs.logsumexp(-1, keepdim=True) + math.log(len(logits))
    if noise is None:
        return float((log_probs.exp() * gains).sum(1).mean())
    return float(gains.diagonal(dim1=0, dim2=2).mean())
