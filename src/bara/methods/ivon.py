"""IVON: a Gaussian posterior over the adapter from the optimiser (arXiv 2402.17641, 2506.14280)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bara.draws.draws import attach_draws
from bara.errors import BaraError
from bara.methods.weight_draws import Factors, WeightDraws
from bara.training.trainer import AdapterTrainer


@dataclass(frozen=True)
class IvonOptions:
    """Options of the method `ivon`; the defaults are those of IVON-LoRA for small data sets.

    The learning rate of the recipe is the largest step of a weight, as it is for Adam.
    `training.weight_decay` is the precision of the prior, relative to `ess`.

    Attributes:
        ess: effective sample size; the larger, the narrower the posterior.
        hess_init: where the diagonal of the Hessian starts.
        clip_radius: bound on the preconditioned gradient.
        beta2: decay of the Hessian's running average.
    """

    ess: float = 1e6
    hess_init: float = 1e-3
    clip_radius: float = 1e-3
    beta2: float = 0.99999

    def __post_init__(self) -> None:
        if min(self.ess, self.hess_init, self.clip_radius) <= 0 or not 0 <= self.beta2 <= 1:
            raise BaraError(
                "method ivon: ess, hess_init and clip_radius must be > 0 and beta2 in [0, 1]"
            )


class IvonTrainer(AdapterTrainer):
    """Trains under a fresh draw of the weights in every step."""

    weight_noise = True

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """IVON on what is trained.

        Raises:
            BaraError: gradients are to be accumulated.
        """
        from ivon import IVON

        if self.args.gradient_accumulation_steps > 1:
            raise BaraError(
                "method ivon: one draw of the weights belongs to a step, so "
                "training.gradient_accumulation_steps must be 1"
            )
        if self.optimizer is None:
            options = self.options
            self.optimizer = IVON(
                [p for p in self.trained.parameters() if p.requires_grad],
                lr=self.args.learning_rate / options.clip_radius,
                ess=options.ess,
                hess_init=options.hess_init,
                beta2=options.beta2,
                weight_decay=self.args.weight_decay,
                clip_radius=options.clip_radius,
                rescale_lr=False,
            )
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step; see `Trainer.training_step`."""
        with self._ivon().sampled_params(train=True):
            return super().training_step(*args, **kwargs)

    def finish(self) -> None:
        model = self.trained
        attach_draws(model, WeightDraws(model, ivon_factors(model, self._ivon())))

    def _ivon(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it


def ivon_factors(model: nn.Module, optimiser: Any) -> dict[str, Factors]:
    """The posterior of an `ivon.IVON` optimiser: N(w, 1 / (ess (hessian + weight_decay))).

    Args:
        model: what it trains.
        optimiser: after training.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    factors = {}
    for group in optimiser.param_groups:
        std = (group["ess"] * (group["hess"] + group["weight_decay"])).rsqrt()
        sizes = [parameter.numel() for parameter in group["params"]]
        for parameter, part in zip(group["params"], std.split(sizes), strict=True):
            rows = (parameter.shape[0], -1) if parameter.dim() > 1 else (-1,)
            factors[names[id(parameter)]] = Factors(part.reshape(rows).detach().clone())
    return factors
