"""Training-free Bayesianisation of a trained LoRA adapter (TFB, arXiv 2412.05723)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm.auto import tqdm

from bara.draws.draws import attach_draws, draw_source
from bara.errors import BaraError
from bara.methods.weight_draws import Factors, WeightDraws
from bara.prediction.predict import predict
from bara.prediction.predictive import ClassificationPredictive, Predictive, RegressionPredictive
from bara.prediction.temperature import negative_log_likelihood
from bara.training.trainer import AdapterTrainer


@dataclass(frozen=True)
class TfbOptions:
    """Options of the method `tfb`.

    Attributes:
        tolerance: how much the anchors' loss may grow, relative to the loss without noise; > 0.
        num_anchors: how many of the training examples are used, at least 1.
    """

    tolerance: float = 0.003
    num_anchors: int = 200

    def __post_init__(self) -> None:
        whole = isinstance(self.num_anchors, int)
        if not (self.tolerance > 0 and whole and self.num_anchors >= 1):
            raise BaraError("method tfb: tolerance must be > 0 and num_anchors a whole number >= 1")


BOUNDS = (1e-4, 1.0)
"""The least and the largest sigma."""


def tfb(
    model: nn.Module,
    data: Any,
    *,
    tolerance: float = 0.003,
    num_draws: int = 10,
    seed: int = 0,
    rounds: int = 8,
    batch_size: int = 64,
) -> float:
    """Gives a trained LoRA adapter, of whatever origin, the largest noise that its loss bears.

    Args:
        model: a PEFT model with a LoRA adapter; it gets the draws, and its weights stay the mean.
        data: anchors, as `bara.predict` takes them: training data, or any data of the task.
            Without labels the model's own predictions stand for them.
        tolerance: bound on (loss(sigma) - loss(0)) / |loss(0)|, the loss being the negative
            log-likelihood of the mixture over `num_draws` draws.
        num_draws, seed, batch_size: those of `bara.predict` in the search.
        rounds: see `largest_noise`.

    Returns:
        sigma, from 1e-4, also if even that exceeds the tolerance, to 1.

    Raises:
        BaraError: see `largest_noise`.
    """
    options: dict[str, Any] = {
        "num_draws": num_draws,
        "seed": seed,
        "batch_size": batch_size,
        "progress": False,
    }
    reference: Predictive | None = None

    def loss() -> float:
        nonlocal reference
        predictive = _labelled(predict(model, data, **options), reference)
        reference = reference or predictive
        return float(negative_log_likelihood(predictive))

    return largest_noise(model, loss, tolerance=tolerance, rounds=rounds)


def largest_noise(
    model: nn.Module,
    loss: Callable[[], float],
    *,
    tolerance: float = 0.003,
    rounds: int = 8,
) -> float:
    """Gives a LoRA adapter the largest noise under which a loss grows no more than allowed.

    With B = U diag(d) V^T the draws are A + V diag(sigma / d) E (their equation 6), so that the
    adapter's product gets noise sigma U E: of one size in all directions that B spans. sigma is
    found by bisection of its logarithm, with the same random numbers in every round.

    Args:
        model: a PEFT model with a LoRA adapter; it gets the draws, and its weights stay the mean.
        loss: of the model's mixture over draws, with the same draws whenever it is called. It is
            called first without noise.
        tolerance: bound on (loss(sigma) - loss(0)) / |loss(0)|.
        rounds: of bisection: the precision is 10^4 to the power of 2^-rounds.

    Returns:
        sigma, from 1e-4, also if even that exceeds the tolerance, to 1.

    Raises:
        BaraError: the model has no LoRA adapter, or one that has a posterior already.
    """
    if draw_source(model) is not None:
        raise BaraError("tfb: this model has a posterior already; give it a plain LoRA adapter")
    directions = dict(_directions(model))
    if not directions:
        raise BaraError("tfb: the model has no LoRA adapter on linear or convolution layers")
    low, high = BOUNDS
    with tqdm(total=rounds + 2, desc="fitting the noise", disable=None) as bar:

        def measured() -> float:
            value = loss()
            bar.update()
            return value

        without = measured()
        bound = without + tolerance * abs(without)

        def bearable(sigma: float) -> bool:
            _attach(model, directions, sigma)
            return measured() <= bound

        if bearable(high):
            return high
        for _ in range(rounds):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if bearable(middle) else (low, middle)
    _attach(model, directions, low)
    return low


class TfbTrainer(AdapterTrainer):
    """Trains LoRA, then searches the noise on training examples."""

    weight_noise = True

    def finish(self) -> None:
        data: Any = self.train_dataset
        anchors = data.select(range(min(len(data), self.options.num_anchors)))
        tfb(self.trained, anchors, tolerance=self.options.tolerance)


def _directions(model: nn.Module) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """By the name of every active A: V, (r, r), and 1 / d, (r, 1), with 0 for d = 0."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            if adapter not in module.lora_A:
                continue
            weight = module.lora_B[adapter].weight
            assert isinstance(weight, Tensor)
            b = weight.detach().float().flatten(1)
            b = pad(b, (0, 0, 0, max(0, b.shape[1] - b.shape[0])))  # V is (r, r) in any case
            _, d, v = torch.linalg.svd(b, full_matrices=False)
            inverse = torch.where(d > 1e-6 * d.max(), 1 / d, 0.0)
            yield f"{name}.lora_A.{adapter}.weight", (v.mT.contiguous(), inverse.unsqueeze(1))


def _attach(model: nn.Module, directions: dict[str, tuple[Tensor, Tensor]], sigma: float) -> None:
    factors = {n: Factors(sigma * inverse, left=v) for n, (v, inverse) in directions.items()}
    attach_draws(model, WeightDraws(model, factors))


def _labelled(predictive: Predictive, reference: Predictive | None) -> Predictive:
    """The prediction with its labels, or else with the reference's, or its own as labels."""
    if not isinstance(predictive, ClassificationPredictive | RegressionPredictive):
        raise BaraError("tfb: this is for classification and regression")
    if predictive.labels is not None:
        return predictive
    if reference is not None:
        return replace(predictive, labels=reference.labels)
    if isinstance(predictive, ClassificationPredictive):
        return replace(predictive, labels=predictive.prediction)
    return replace(predictive, labels=predictive.mean)
