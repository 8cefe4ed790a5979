"""A linear probe: what a linear layer makes of the frozen model's features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor
from transformers.trainer_utils import TrainOutput

from bara.draws.draws import attach_draws
from bara.errors import BaraError
from bara.methods.linear import (
    Fit,
    LinearPosterior,
    cross_validated,
    logistic_posterior,
    ridge_posterior,
)
from bara.methods.weight_draws import Factors, WeightDraws
from bara.prediction.batches import batches
from bara.prediction.temperature import output_layer
from bara.training.head import head_inputs
from bara.training.logistic import Standardised
from bara.training.trainer import AdapterTrainer


@dataclass(frozen=True)
class ProbeOptions:
    """Options of the method `probe`.

    Attributes:
        prior_variance: of a weight, for features that are centred and scaled to a mean square of 1:
            C of logistic regression, or 1 / alpha of ridge regression. None cross-validates it.
        num_folds: of the cross-validation, at least 2.
        tolerance: how much the cross-validated loss may grow when draws replace the mean weights,
            relative to the loss; > 0. See `bara.methods.linear.cross_validated`.
    """

    prior_variance: float | None = None
    num_folds: int = 5
    tolerance: float = 0.003

    def __post_init__(self) -> None:
        if self.prior_variance is not None and self.prior_variance <= 0:
            raise BaraError("method probe: prior_variance must be > 0, or null to find it")
        if self.num_folds < 2 or self.tolerance <= 0:
            raise BaraError("method probe: num_folds must be at least 2 and tolerance > 0")


def probe_options(*_: Any) -> dict[str, Any]:
    """Options of a `peft.LoraConfig` that adapts no layer: the adapter is the head alone."""
    return {"r": 1, "target_modules": DUMMY_TARGET_MODULES}


class ProbeTrainer(AdapterTrainer):
    """Fits the head to the frozen model's features; of `args` it uses batch size and seed."""

    weight_noise = True

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Fits the head in place of training."""
        callbacks = self.callback_handler
        self.control = callbacks.on_train_begin(self.args, self.state, self.control)
        model: Any = self.trained
        head = output_layer(model)
        data = batches(self.train_dataset, model, self.args.eval_batch_size, progress=False)
        x, y = head_inputs(model, head, (batch for batch, _ in data))
        assert y is not None
        scale = Standardised.of(x)
        posterior = self._fit(scale(x), y, head.out_features)
        weights, covariance = raw_weights(scale, posterior)
        with torch.no_grad():
            head.weight.copy_(weights[:, :-1])
            head.bias.copy_(weights[:, -1])
        name = next(n for n, module in self.trained.named_modules() if module is head)
        self.draws = WeightDraws(self.trained, {name: covariance}, shared=True)
        self.control = callbacks.on_train_end(self.args, self.state, self.control)
        return TrainOutput(global_step=0, training_loss=posterior.loss(scale(x), y), metrics={})

    def finish(self) -> None:
        attach_draws(self.trained, self.draws)

    def _fit(self, x: Tensor, y: Tensor, outputs: int) -> LinearPosterior:
        config: Any = self.trained.config
        fit: Fit = ridge_posterior
        if config.problem_type != "regression":
            fit = partial(logistic_posterior, num_classes=outputs)
        options: ProbeOptions = self.options
        if options.prior_variance is not None:
            return fit(x, y, options.prior_variance)
        return cross_validated(fit, x, y, options.num_folds, options.tolerance, self.args.seed)


def raw_weights(standardised: Standardised, posterior: LinearPosterior) -> tuple[Tensor, Factors]:
    """Mean and covariance of a linear layer's weight and bias side by side, (outputs, d + 1).

    The second output of a regression is the logarithm of the noise's variance, a constant.
    """
    mean, factors = posterior.mean @ standardised.matrix, posterior.covariance
    scale, left = factors.scale, factors.left
    if posterior.noise is not None:
        constant = torch.zeros_like(mean)
        constant[0, -1] = math.log(posterior.noise)
        mean, left = torch.cat([mean, constant]), None
        scale = torch.cat([scale, torch.zeros_like(scale)])
    assert factors.right is not None
    right = standardised.matrix.T @ factors.right
    return mean.float(), Factors(
        scale.float(), None if left is None else left.float(), right.float()
    )
