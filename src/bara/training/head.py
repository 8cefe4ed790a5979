"""How quickly a new head learns: its weight in units that suit the width of its input.

A head starts at random and learns by Adam, whose steps do not know what the encoder's features
measure. Where they hardly vary, as a first token's do, the head crawls, and the KL closes gates
before the adapter has learned. Where they tell the classes apart already, the head has to come
first; where they do not, a quick head learns its few texts by heart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from bara.adapter.elbo import elbo_of
from bara.draws.sharing import evaluating
from bara.errors import BaraError
from bara.prediction.batches import to_device
from bara.training.logistic import prior_variance

NARROWEST, WIDEST = 0.2, 1.0
"""Bounds of the default width of a head's input."""
EXPONENT = 0.3
"""The default width is C**EXPONENT, of the cross-validated C of a logistic regression."""
NUM_ROWS = 1000
"""Training examples whose features are looked at."""


class ScaledLinear(nn.Linear):
    """y = V (scale x) + b: what an optimiser sees of a linear layer whose weight is W = scale V.

    Only the parameter is in other units: the state dict has W, and so has every file. `scale` is a
    power of two, so that nothing is rounded on the way.
    """

    scale: float

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x * self.scale, self.weight, self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"] * self.scale

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        name = f"{prefix}weight"
        if name in state_dict:
            state_dict = {**state_dict, name: state_dict[name] / self.scale}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def scale_head(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float | None:
    """Has the new head of an adapter learn at a pace that suits its input, whatever the encoder.

    `bara.BayesianCallback` calls this before training; a loop of your own calls it once, before its
    first step, also when it goes on with an earlier training. Outputs do not change: the weight is
    kept in units of 1 / scale (`ScaledLinear`), where an optimiser that normalises gradients, as
    Adam does, changes the logits `scale` times as quickly. Files and state dicts have the weight
    itself.

    The scale brings the standard deviation of the head's input, about its mean and over the
    features of the frozen model, to the configuration's `head_input_std`, up to a power of two.
    BaRA's default of it is C^0.3, from 0.2 to 1, with the C (variance of the prior) of a logistic
    regression on these features that three-fold cross-validation finds best: a head for features
    that tell the classes apart learns quickly, one that would learn noise slowly. 0.2 where labels
    are no single classes.

    Args:
        model: with Bayesian adapters, and their heads in `modules_to_save`.
        batches: training data for the model's forward, with `labels`; the first 1,000 rows are
            used.

    Returns:
        The scale; None where there is no such head, no adapter in training, or `head_input_std` is
        0. Heads that see each token (token classification, questions) are left alone too.
    """
    restore_head(model)
    scale = None
    for name, adapter in elbo_of(model).adapters.items():
        head = _head(model, name)
        if head is None or adapter.config.head_input_std == 0:
            continue
        trained, original = head
        with _without_adapters(model):
            x, labels = head_inputs(model, original, batches, NUM_ROWS)
        std = float((x - x.mean(0)).square().mean().sqrt())
        if x.dim() != 2 or std == 0:
            continue
        wanted = adapter.config.head_input_std
        if wanted is None:
            wanted = _default_std(x, labels, trained.out_features)
        scale = 2.0 ** round(math.log2(wanted / std))
        _give(trained, scale)
    return scale


def _default_std(x: Tensor, labels: Tensor | None, num_classes: int) -> float:
    """How wide a head's input is to be, by what a linear head makes of the frozen features."""
    variance = None
    if labels is not None and labels.dim() == 1 and not labels.is_floating_point():
        known = labels != -100
        variance = prior_variance(x[known], labels[known], num_classes)
    if variance is None:
        return NARROWEST
    return min(WIDEST, max(NARROWEST, variance**EXPONENT))


def restore_head(model: nn.Module) -> None:
    """Makes scaled heads plain linear layers again, with the same outputs."""
    for module in model.modules():
        if type(module) is ScaledLinear:
            with torch.no_grad():
                module.weight.mul_(module.scale)
            del module.scale
            _become(module, nn.Linear)


def scale_head_of(model: nn.Module, dataloader: DataLoader[Any]) -> None:
    """`scale_head` with examples from all over a training set, the same for all processes."""
    dataset: Any = dataloader.dataset
    if hasattr(dataset, "__len__"):
        rows = range(0, len(dataset), -(-len(dataset) // NUM_ROWS))
        batch_size = dataloader.batch_size or 8
        dataloader = DataLoader(Subset(dataset, rows), batch_size, collate_fn=dataloader.collate_fn)
    scale_head(model, dataloader)


def _give(layer: nn.Linear, scale: float) -> None:
    with torch.no_grad():
        layer.weight.div_(scale)
    _become(layer, ScaledLinear)
    layer.scale = scale  # type: ignore[assignment]  # it is one now


def _become(layer: Any, kind: type[nn.Linear]) -> None:
    """Changes a layer's class in its place: its parameters stay those that an optimiser has."""
    layer.__class__ = kind


def _head(model: nn.Module, adapter: str) -> tuple[nn.Linear, nn.Module] | None:
    """The last linear layer of an adapter's trained head, and the base model's that it copies."""
    found = None
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            for path, layer in module.modules_to_save[adapter].named_modules():
                if type(layer) is nn.Linear and layer.weight.requires_grad:
                    found = layer, module.original_module.get_submodule(path)
    return found


def _without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    """The frozen model, also where training goes on with an adapter that has learned."""
    peft = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    return nullcontext() if peft is None else peft.disable_adapter()


@torch.no_grad()
def head_inputs(
    model: nn.Module,
    layer: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    num_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What a model gives a layer, in evaluation mode, and the labels beside it; on the CPU.

    Args:
        model: the model.
        layer: one of its modules, called once for a batch.
        batches: for the model's forward, with `labels` or without.
        num_rows: as many are enough; None for all.

    Returns:
        The layer's input (n, d), float64, and the labels (n, ...), or None without them. Of a layer
        that sees each token the first batch's alone, (B, T, d).

    Raises:
        BaraError: there are no batches.
    """
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    device = next(model.parameters()).device
    hook = layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].double().cpu()))
    try:
        with evaluating(model):
            for batch in batches:
                inputs = dict(batch)
                if (label := inputs.pop("labels", None)) is not None:
                    labels.append(label.cpu())
                model(**to_device(inputs, device))
                if rows[-1].dim() != 2:
                    return rows[-1], None
                if num_rows is not None and sum(map(len, rows)) >= num_rows:
                    break
    finally:
        hook.remove()
    if not rows:
        raise BaraError("scale_head: there are no batches; give those of the training data.")
    return torch.cat(rows), torch.cat(labels) if len(labels) == len(rows) else None
