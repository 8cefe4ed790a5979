"""Selective answering: the uncertainty above which to abstain, with a guarantee on the risk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Required

import torch
from torch import Tensor

from bara.cards.adapter_files import ABSTENTION_FILE
from bara.errors import BaraError
from bara.evaluation.metrics import selection
from bara.files import atomic_write_text
from bara.prediction.predictive import Predictive, RegressionPredictive
from bara.schema import field_types, mapping_of, read_json

FILE = ABSTENTION_FILE
LEARNING_SHARE = 4
"""One example in so many chooses the order of the tests; the others are tested."""


@dataclass(frozen=True)
class Threshold:
    """The uncertainty up to which a model answers.

    Attributes:
        uncertainty: the threshold; None if none was found, so that every input is declined.
        risk: bound on the mean loss over the answered inputs.
        delta: probability, over the calibration data, that the bound does not hold.
        coverage: share of the tested calibration examples that are answered.
        num_examples: calibration examples.
    """

    uncertainty: float | None
    risk: float
    delta: float
    coverage: float
    num_examples: int

    def abstains(self, uncertainty: Tensor | float) -> Any:
        """True where the model should not answer, in the shape of the uncertainty; also where that
        is NaN."""
        if self.uncertainty is None:
            return torch.ones_like(torch.as_tensor(uncertainty), dtype=torch.bool)
        return ~(torch.as_tensor(uncertainty, dtype=torch.float64) <= self.uncertainty)

    def take_back(self, records: list[dict[str, Any]], uncertainty: Tensor) -> None:
        """Marks the records (n) of uncertain (n,) predictions as abstained, without prediction."""
        for record, abstained in zip(records, self.abstains(uncertainty).tolist(), strict=True):
            record["abstained"] = abstained
            if abstained:
                record["prediction"] = None


_SAVED = mapping_of(
    {name: Required[kind] for name, kind in field_types(Threshold).items()}
    | {"conditions": Required[dict[str, Any]]}
)
"""A threshold in the file, with what it was calibrated under."""


def calibrate_threshold(
    predictive: Predictive | tuple[Tensor, Tensor],
    *,
    risk: float = 0.1,
    delta: float = 0.1,
    seed: int = 0,
) -> Threshold:
    """The uncertainty above which to abstain, so that what is answered is wrong seldom enough.

    With probability at least 1 - delta over the calibration data, the expected loss of an answered
    input is at most `risk`, whatever the model and the distribution, as long as calibration data
    and later inputs are independent draws from it. It is Learn-then-Test (Angelopoulos et al. 2021,
    arXiv 2110.01052) with split fixed-sequence testing: a quarter of the examples, at random, gives
    the candidates (their uncertainties) and the most promising one; from there on towards more
    answers, every candidate is tested on the others until one fails. p-values are exact binomial
    tails for losses of 0 and 1, and Hoeffding-Bentkus (Bates et al. 2021, arXiv 2101.02703) for
    others in [0, 1].

    Args:
        predictive: labelled predictions on held-out data: the uncertainty is 1 - probability of an
            input's prediction, the loss 1 for an error (of any of its labels or words). Or
            (uncertainty, loss), (n,) each.
        risk: in (0, 1), the wanted mean loss of the answered inputs.
        delta: in (0, 1).
        seed: of the split.

    Raises:
        BaraError: numbers out of range, NaN, losses outside [0, 1], predictions of a regression
            (give a pair), no labels, or too few examples for any threshold to pass.
    """
    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < value < 1:
            raise BaraError(f"{name} must lie between 0 and 1, not {value!r}")
    if isinstance(predictive, RegressionPredictive):  # squared errors, which may happen to be small
        raise BaraError(
            "a regression has no errors to count: give a pair (uncertainty, loss), e.g. whether "
            "the error is too large"
        )
    pair = predictive if isinstance(predictive, tuple) else selection(predictive)
    uncertainty, loss = (torch.as_tensor(values).cpu().double() for values in pair)
    if uncertainty.shape != loss.shape or loss.dim() != 1:
        raise BaraError("uncertainty and loss must be one number for each example")
    if uncertainty.isnan().any() or loss.isnan().any() or ((loss < 0) | (loss > 1)).any():
        raise BaraError(
            "the losses must lie in [0, 1], and neither they nor the uncertainties be NaN"
        )
    needed = math.ceil(math.log(delta) / math.log1p(-risk)) * LEARNING_SHARE / (LEARNING_SHARE - 1)
    if len(loss) < needed + 1:
        raise BaraError(
            f"{len(loss)} examples cannot show a risk of {risk:g} with delta {delta:g} "
            f"(--calibrate-risk, --calibrate-delta): at least {math.ceil(needed) + 1} are needed, "
            "and more are better"
        )
    order = torch.randperm(len(loss), generator=torch.Generator().manual_seed(seed))
    learn, test = order[: len(loss) // LEARNING_SHARE], order[len(loss) // LEARNING_SHARE :]
    candidates = uncertainty[learn].unique()
    answered = uncertainty <= candidates.unsqueeze(1)  # (candidates, n)
    lost = answered * loss
    counts, sums = (
        (values[:, learn].sum(1), values[:, test].sum(1)) for values in (answered, lost)
    )
    binary = bool(((loss == 0) | (loss == 1)).all())
    size = len(test) / len(learn)
    promise = p_values(sums[0] * size, counts[0] * size, risk, binary)
    passed = p_values(sums[1], counts[1], risk, binary) <= delta
    start = int(promise.argmin())
    found, coverage = None, 0.0
    for i in range(start, len(candidates)):
        if not passed[i]:
            break
        found, coverage = float(candidates[i]), float(counts[1][i] / len(test))
    return Threshold(found, risk, delta, coverage, len(loss))


def p_values(sums: Tensor, counts: Tensor, risk: float, binary: bool) -> Tensor:
    """p-values of the hypotheses that an expected loss is above `risk`; 1 without examples.

    Args:
        sums: (m,) summed losses, each of independent ones in [0, 1].
        counts: how many losses there are in each sum.
        risk: the bound.
        binary: whether all losses are 0 or 1.
    """
    from scipy.stats import binom

    n = counts.double().floor()
    if binary:
        tail = binom.cdf((sums + 1e-9).floor().numpy(), n.numpy(), risk)
        return torch.as_tensor(tail).masked_fill(n == 0, 1.0)
    low = (sums / n.clamp(min=1)).clamp(max=risk)
    bound = torch.tensor(risk, dtype=torch.float64)
    distance = torch.xlogy(low, low / bound) + torch.xlogy(1 - low, (1 - low) / (1 - bound))
    bentkus = math.e * torch.as_tensor(binom.cdf((sums - 1e-9).ceil().numpy(), n.numpy(), risk))
    return torch.minimum(torch.exp(-n * distance), bentkus).clamp(max=1).masked_fill(n == 0, 1.0)


def save_threshold(folder: str | Path, threshold: Threshold, **conditions: Any) -> None:
    """Writes a threshold beside an adapter, with what it was calibrated under (`num_draws`, ...).

    Thresholds for other risks stay.
    """
    path = Path(folder) / FILE
    known = read_thresholds(folder)
    known[f"{threshold.risk:g}"] = {**asdict(threshold), "conditions": conditions}
    atomic_write_text(path, json.dumps(known, indent=2) + "\n")


TYPED = {
    "num_draws": " (--num-draws)",
    "seed": " (--seed)",
    "chat": " (--chat)",
    "decoding": " (--max-new-tokens, --set of `bara generate`)",
}
"""The commands' options for the conditions."""


def load_threshold(folder: str | Path, risk: float, **conditions: Any) -> Threshold:
    """The threshold for a risk, if it was calibrated under the same conditions.

    Raises:
        BaraError: there is none, it was calibrated under others, or the file is damaged.
    """
    known = read_thresholds(folder)
    values = known.get(f"{risk:g}")
    if values is None:
        there = f" (there is one for {', '.join(sorted(known))})" if known else ""
        raise BaraError(
            f"{folder} has no threshold for the risk {risk:g}{there}: make one with labelled data, "
            f"bara evaluate {folder} --data LABELLED --calibrate-risk {risk:g}"
        )
    given = values.pop("conditions")
    threshold = Threshold(**values)
    require_conditions("the threshold was calibrated", given, conditions)
    return threshold


def require_conditions(what: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises BaraError for a calibration under other conditions than the prediction's."""
    for name, value in wanted.items():
        if given.get(name) != value:
            raise BaraError(
                f"{what} with {name} = {given.get(name)}, not {value}{TYPED.get(name, '')}: use "
                "that, or calibrate again"
            )


def read_thresholds(folder: str | Path) -> dict[str, Any]:
    """The thresholds of an adapter's folder by their risk, as they were saved.

    Raises:
        BaraError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    mend = "it is damaged: remove it and calibrate again"
    known: dict[str, Any] = read_json(path, dict[str, _SAVED], mend)  # type: ignore[valid-type]
    return known
