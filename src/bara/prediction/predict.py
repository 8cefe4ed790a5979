"""The predictive distribution: a mixture over draws of the posterior."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from bara.draws.blocks import Blocks
from bara.draws.portions import Portions
from bara.draws.sharing import evaluating
from bara.errors import BaraError
from bara.prediction.batches import Collate, batches, num_rows, to_device
from bara.prediction.likelihood import MIN_LOG_VARIANCE, require_finite
from bara.prediction.predictive import ClassificationPredictive, Predictive, RegressionPredictive
from bara.prediction.temperature import get_temperature


def predict(
    model: nn.Module,
    data: Any,
    *,
    num_draws: int = 10,
    seed: int = 0,
    deterministic: bool = False,
    batch_size: int = 64,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
    noise_variance: float = 0.5,
) -> Predictive:
    """Predictive distribution of a classifier or a regression model.

    A model without a posterior is predicted with as it is, as one draw. An ensemble has as many
    draws as members, whatever `num_draws`. A temperature that was fitted for the model
    (`bara.methods.set_temperature`) is applied to every draw.

    Args:
        model: any transformers (or PEFT) model whose output has `logits` of shape (n, outputs).
        data: a tokenised `datasets.Dataset` or `IterableDataset`, a DataLoader or one batch; labels
            are kept.
        num_draws: S, draws of the posterior. All are computed in one pass as far as `batch_size`
            allows. The same seed gives the same draws, whatever the batch size.
        deterministic: use the posterior mean, as `model.eval()` does, instead of draws.
        batch_size: most rows (inputs times draws) in one forward pass: bounds the memory.
        collate_fn: makes a batch of a data set's rows; None pads on the right.
        progress: show a progress bar on standard error; None does so on a terminal.
        noise_variance: for regression with one output, the variance of the noise in the units of
            the model's output, squared; 0.5 is what a mean-squared-error loss trains.

    Returns:
        A `ClassificationPredictive`, or for regression (one output, or two outputs for mean and
        log-variance with `config.problem_type == "regression"`) a `RegressionPredictive`.

    Raises:
        BaraError: num_draws < 1, empty or untokenised data, logits that are not finite or not of
            shape (n, outputs).
    """
    if num_draws < 1:
        raise BaraError(f"num_draws must be at least 1, got {num_draws}.")
    if batch_size < 1:
        raise BaraError(f"batch_size must be at least 1, got {batch_size}.")
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False) and base.can_generate():
        raise BaraError(
            f"predict is for classes and numbers: use bara.generate for a {type(base).__name__}."
        )
    draws = Portions(model, None if deterministic else num_draws, seed)
    device = next(model.parameters()).device
    takes = _accepted(model)
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    order: list[int] = []
    with evaluating(model):
        inputs = max(1, batch_size // draws.num_draws)
        for batch, index in batches(data, model, inputs, collate_fn, progress):
            if isinstance(batch.get("labels"), Tensor):
                labels.append(batch.pop("labels").cpu())
            known = {k: v for k, v in batch.items() if takes is None or k in takes}
            logits.append(_logits_of_draws(model, draws, to_device(known, device), batch_size))
            order += index
    position = torch.tensor(order).argsort()
    stacked = torch.cat(logits, dim=1)[:, position]
    target = torch.cat(labels)[position] if labels else None
    return _predictive(stacked, target, model, noise_variance)


def _logits_of_draws(
    model: nn.Module, draws: Portions, batch: dict[str, Any], batch_size: int
) -> Tensor:
    """Logits of one batch under every draw, (S, n, outputs), float32 on the CPU."""
    rows = num_rows(batch)

    def run(blocks: Blocks) -> Tensor:
        output = model(**blocks.repeat(batch))
        logits = output.get("logits") if hasattr(output, "get") else None
        expected = rows * blocks.num_draws
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != expected:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
            raise BaraError(
                f"predict needs a model whose output has logits of shape (inputs, outputs), got "
                f"{shape}: a model for sequence or image classification, or regression."
            )
        return blocks.split(require_finite(logits).float().cpu())

    return torch.cat(draws.map(run, rows, batch_size))


def _accepted(model: nn.Module) -> set[str] | None:
    """The forward arguments the base model names, None if there is no telling."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    parameters = inspect.signature(base.forward).parameters
    return set(parameters) if "input_ids" in parameters or "pixel_values" in parameters else None


def _predictive(
    logits: Tensor, labels: Tensor | None, model: nn.Module, noise_variance: float
) -> Predictive:
    outputs = logits.shape[-1]
    config: Any = getattr(model, "config", None)
    temperature = get_temperature(model)
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        raise BaraError("Multi-label classification is not supported by predict.")
    if problem == "regression" or outputs == 1:
        if outputs > 2:
            raise BaraError(f"Regression with {outputs} outputs is not supported: one, or two.")
        mean = logits[..., 0]
        shift = getattr(config, "target_mean", 0.0)
        scale = getattr(config, "target_std", 1.0)
        if outputs == 2:
            # standardised targets have the likelihood of gaussian_nll, with its least variance
            floor = MIN_LOG_VARIANCE if hasattr(config, "target_std") else -math.inf
            variance = logits[..., 1].clamp(min=floor).exp()
        else:
            variance = torch.full_like(mean, noise_variance)
        target = None if labels is None else labels.float().flatten() * scale + shift
        variance = variance * scale**2 * temperature
        return RegressionPredictive(mean * scale + shift, variance, target)
    names = getattr(config, "id2label", None)
    label_names = (
        tuple(names[i] for i in range(outputs)) if names and len(names) == outputs else None
    )
    return ClassificationPredictive((logits / temperature).log_softmax(-1), labels, label_names)
