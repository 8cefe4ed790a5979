"""Temperature scaling of a predictive distribution (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Required

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from bara.errors import BaraError
from bara.prediction.multi_label import MultiLabelPredictive
from bara.prediction.predictive import (
    ClassificationPredictive,
    Predictive,
    RegressionPredictive,
    check_classes,
)
from bara.prediction.words import TokenPredictive
from bara.schema import Positive, mapping_of, read_json

TEMPERATURE = "predictive_temperature"
"""Name of the fitted temperature in the model's configuration."""


def get_temperature(model: nn.Module) -> float:
    """The temperature that `bara.predict` tempers every draw of this model with; 1 by default."""
    return float(getattr(getattr(model, "config", None), TEMPERATURE, 1.0))


TEMPERATURE_FILE = "temperature.json"
RANGE = (0.05, 20.0)
"""Where a temperature is looked for."""
Tempered = ClassificationPredictive | MultiLabelPredictive | RegressionPredictive
"""What a temperature is fitted to; words are classes."""
_SAVED = mapping_of({"temperature": Required[Positive]})


def fit_temperature(predictive: Predictive) -> float:
    """The temperature T that minimises the negative log-likelihood of held-out labels.

    Every draw is tempered, p(y | x, draw)^(1/T) normalised, and the mixture over the draws is
    scored: softmax(logits / T) for classes (of inputs, or of words), sigmoid(logits / T) for labels
    (an input's together), T times the variance for a Gaussian. The search is a grid over log T that
    is refined around its best point, to a relative precision below 1e-5.

    Args:
        predictive: the untempered prediction of held-out data, with labels.

    Raises:
        BaraError: there are no labels, or they are no classes, NaN or infinite.
    """
    if predictive.labels is None:
        raise BaraError("a temperature is fitted to labels: give labelled held-out data")
    scored = predictive.labelled if isinstance(predictive, TokenPredictive) else predictive
    if isinstance(scored, ClassificationPredictive) and scored.labels is not None:
        check_classes(scored.labels, scored.num_classes)
    if not negative_log_likelihood(scored).isfinite():  # of which no temperature is the best
        raise BaraError(
            "a temperature is fitted to one label or more, none of them NaN or infinite: fill "
            "these in or drop them"
        )
    low, high = torch.tensor(RANGE, dtype=torch.float64).log()
    for _ in range(8):
        grid = torch.linspace(float(low), float(high), 21, dtype=torch.float64)
        best = int(
            torch.stack(
                [negative_log_likelihood(predictive, float(t.exp())) for t in grid]
            ).argmin()
        )
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 20)]
    return float(((low + high) / 2).exp())


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Makes `bara.predict` temper every draw of this model.

    Args:
        model: a transformers (or PEFT) model.
        temperature: T > 0; 1 changes nothing.
    """
    config: Any = model.config
    setattr(config, TEMPERATURE, float(temperature))


@torch.no_grad()
def fold_temperature(model: PeftModel) -> None:
    """Moves the temperature from the model's configuration into its head, in place.

    The head's last layer gives logits / T instead of logits; for a regression with mean and
    log-variance, log T is added to the log-variance. Both are exact, but for regression where the
    least variance of `bara.predict` applies.

    Raises:
        BaraError: see `output_layer`.
    """
    config: Any = model.config
    temperature = get_temperature(model)
    layer = output_layer(model)
    if config.problem_type == "regression":
        layer.bias[1] += math.log(temperature)
    else:
        for parameter in layer.parameters():
            parameter.div_(temperature)
    delattr(config, TEMPERATURE)


def output_layer(model: PeftModel) -> nn.Linear:
    """The last layer of the head that was trained with the adapter (`modules_to_save`).

    Raises:
        BaraError: the model's temperature cannot be folded into it: it is no linear layer with one
            output for each class, or for the mean and the log-variance of a regression.
    """
    config: Any = model.config
    layers = [
        layer
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper)
        for layer in module.modules_to_save[model.active_adapter].modules()
        if isinstance(layer, nn.Linear) and layer.out_features == config.num_labels
    ]
    regression = config.problem_type == "regression"
    if not layers or (regression and (config.num_labels != 2 or layers[-1].bias is None)):
        raise BaraError(
            f"the temperature {get_temperature(model):.3g} that was fitted to this model cannot be "
            "folded into its last layer, which was not trained with the adapter: train without "
            "+temperature, or give it up with bara.methods.set_temperature(model, 1)"
        )
    return layers[-1]


def save_temperature(model: nn.Module, folder: Path) -> None:
    """Writes the model's temperature, if it has one."""
    temperature = getattr(model.config, TEMPERATURE, None)
    if temperature is not None:
        (folder / TEMPERATURE_FILE).write_text(json.dumps({"temperature": temperature}), "utf-8")


def load_temperature(model: nn.Module, folder: Path) -> None:
    """Reads what `save_temperature` wrote.

    Raises:
        BaraError: the file is missing or damaged, or holds no number above 0.
    """
    saved = read_json(folder / TEMPERATURE_FILE, _SAVED, "train again or restore the file")
    set_temperature(model, saved["temperature"])


def negative_log_likelihood(predictive: Predictive, temperature: float = 1.0) -> Tensor:
    """Mean negative log-likelihood of the labels under the mixture of tempered draws, in nats."""
    scored = predictive.labelled if isinstance(predictive, TokenPredictive) else predictive
    assert isinstance(scored, Tempered)
    assert scored.labels is not None
    return -scored.tempered(temperature).log_prob(scored.labels).mean()
