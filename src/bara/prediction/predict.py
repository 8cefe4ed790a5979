"""The predictive distribution: a mixture over draws of the posterior."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bara.data.questions import QuestionWindows
from bara.draws.draws import check_draws
from bara.draws.portions import Portions
from bara.draws.sharing import evaluating
from bara.errors import BaraError
from bara.prediction.batches import Collate
from bara.prediction.likelihood import MIN_LOG_VARIANCE
from bara.prediction.multi_label import MultiLabelPredictive
from bara.prediction.outputs import base_of, outputs_of_draws
from bara.prediction.predictive import ClassificationPredictive, Predictive, RegressionPredictive
from bara.prediction.spans import SpanCollector, start_and_end
from bara.prediction.temperature import get_temperature
from bara.prediction.words import WordCollector, WordPooling


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
    words: WordPooling = "first",
) -> Predictive:
    """Predictive distribution of a model for texts or images.

    A model without a posterior, or whose adapter is merged or disabled, is predicted with as it is,
    as one draw. An ensemble has as many draws as members, whatever `num_draws`. A temperature that
    was fitted for the model (`bara.methods.set_temperature`) is applied to every draw.

    Args:
        model: any transformers (or PEFT) model whose output has `logits` of shape (n, outputs), or
            for token classification (n, tokens, classes), or `start_logits` and `end_logits`.
        data: a tokenised `datasets.Dataset` or `IterableDataset`, a DataLoader or one batch; labels
            are kept. For question answering what `bara.question_windows` makes.
        num_draws: S, draws of the posterior. All are computed in one pass as far as `batch_size`
            allows. The same seed gives the same draws, whatever the batch size.
        deterministic: use the posterior mean, as `model.eval()` does, instead of draws.
        batch_size: most rows (inputs times draws) in one forward pass: bounds the memory.
        collate_fn: makes a batch of a data set's rows; None pads on the right.
        progress: show a progress bar on standard error; None does so on a terminal.
        noise_variance: for regression with one output, the variance of the noise in the units of
            the model's output, squared; 0.5 is what a mean-squared-error loss trains.
        words: for token classification with a column `word_ids` (the word that each token belongs
            to, -1 for none): a word's probabilities are those of its `first` token, which training
            labels, or the `mean` over its tokens; `tokens` has a prediction for each of them.

    Returns:
        A `ClassificationPredictive`; for regression (one output, or two outputs for mean and
        log-variance with `config.problem_type == "regression"`) a `RegressionPredictive`; with
        `problem_type == "multi_label_classification"` a `MultiLabelPredictive`; for a class per
        token a `TokenPredictive`; for question answering a `SpanPredictive`.

    Raises:
        BaraError: num_draws < 1, empty or untokenised data, logits that are not finite or of none
            of these shapes.
    """
    num_draws = check_draws(num_draws)
    if batch_size < 1:
        raise BaraError(f"batch_size must be at least 1, got {batch_size}.")
    if noise_variance < 0:
        raise BaraError(f"noise_variance must be at least 0, got {noise_variance}.")
    base = base_of(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False) and base.can_generate():
        raise BaraError(
            f"predict is for classes and numbers: use bara.generate for a {type(base).__name__}."
        )
    draws = Portions(model, None if deterministic else num_draws, seed)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "collate_fn": collate_fn,
        "progress": progress,
    }
    temperature = get_temperature(model)
    if isinstance(data, QuestionWindows):
        spans = SpanCollector(data, temperature)
        with evaluating(model):
            for both, batch, _ in outputs_of_draws(model, draws, data, start_and_end, **options):
                spans.add(both, batch)
        return spans.predictive()
    collector = WordCollector(words, temperature)
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    order: list[int] = []
    with evaluating(model):
        for part, batch, index in outputs_of_draws(model, draws, data, _logits, **options):
            if part.dim() == 4:
                _require_tokens(part, batch, model)
                collector.add(part, batch, index)
                continue
            if isinstance(batch.get("labels"), Tensor):
                labels.append(batch["labels"].cpu())
            logits.append(part)
            order += index
    if not logits:
        return collector.predictive(_label_names(model))
    position = torch.tensor(order).argsort()
    stacked = torch.cat(logits, dim=1)[:, position]
    if labels and sum(map(len, labels)) != len(position):
        raise BaraError("some rows have labels and others none: fill these in or drop them")
    target = torch.cat(labels)[position] if labels else None
    return _predictive(stacked, target, model, noise_variance)


def _logits(output: Any) -> Tensor:
    logits = output.get("logits") if hasattr(output, "get") else None
    if isinstance(logits, Tensor) and logits.dim() in (2, 3):
        return logits
    if hasattr(output, "get") and output.get("start_logits") is not None:
        raise BaraError("for question answering give predict what bara.question_windows makes")
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
    raise _unknown(shape)


def _unknown(shape: tuple[int, ...] | None) -> BaraError:
    return BaraError(
        f"predict needs a model whose output has logits of shape (inputs, outputs), got "
        f"{shape}: a model for sequence, token or image classification, or regression."
    )


def _require_tokens(logits: Tensor, batch: dict[str, Any], model: nn.Module) -> None:
    """Refuses logits (S, n, T, C) that are not of the tokens' classes, as a language model's."""
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    ids = batch.get("input_ids")
    tokens = isinstance(ids, Tensor) and tuple(ids.shape) == tuple(logits.shape[1:3])
    if not tokens or classes != logits.shape[-1]:
        raise _unknown(tuple(logits.shape[1:]))


def _label_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the classes, if the configuration has one for each."""
    config: Any = getattr(model, "config", None)
    names = getattr(config, "id2label", None)
    return tuple(names[i] for i in range(len(names))) if names else None


def _predictive(
    logits: Tensor, labels: Tensor | None, model: nn.Module, noise_variance: float
) -> Predictive:
    outputs = logits.shape[-1]
    config: Any = getattr(model, "config", None)
    temperature = get_temperature(model)
    problem = getattr(config, "problem_type", None)
    names = _label_names(model)
    names = names if names and len(names) == outputs else None
    if problem == "multi_label_classification":
        return MultiLabelPredictive(logits / temperature, labels, names)
    if problem == "regression" or outputs == 1:
        if outputs > 2:
            raise BaraError(f"Regression with {outputs} outputs is not supported: one, or two.")
        standardised = hasattr(config, "target_std")
        if standardised:  # float32 has no digits for targets that vary little around a large mean
            logits = logits.double()
        mean = logits[..., 0]
        shift = getattr(config, "target_mean", 0.0)
        scale = getattr(config, "target_std", 1.0)
        if outputs == 2:
            # standardised targets have the likelihood of gaussian_nll, with its least variance
            floor = MIN_LOG_VARIANCE if standardised else -math.inf
            variance = logits[..., 1].clamp(min=floor).exp()
        else:
            variance = torch.full_like(mean, noise_variance)
        target = None if labels is None else labels.to(mean.dtype).flatten() * scale + shift
        variance = variance * scale**2 * temperature
        return RegressionPredictive(mean * scale + shift, variance, target)
    return ClassificationPredictive((logits / temperature).log_softmax(-1), labels, names)
