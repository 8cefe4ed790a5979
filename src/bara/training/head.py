"""How quickly a new head learns: its weight in units that suit the width of its input.

A head starts at random and learns by Adam, whose steps do not know what the encoder's features
measure. Where they hardly vary, as a first token's do, the head crawls, and the KL closes gates
before the adapter has learned. Where they tell the classes apart already, the head has to come
first; where they do not, a quick head learns its few texts by heart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from bara.adapter.elbo import adapted_root, elbo_of
from bara.adapter.scaled_head import can_scale, reshard, restore_head, scale_layer
from bara.draws.processes import several_processes
from bara.draws.sharing import evaluating
from bara.errors import BaraError, first_line
from bara.language.prompts import generates
from bara.posteriors.config import Resolved
from bara.posteriors.parameters import can_set
from bara.prediction.batches import to_device
from bara.training.logistic import CrossValidated, cross_validate

NARROWEST, WIDEST = 0.2, 1.0
"""Bounds of the default width of a head's input."""
LITTLE, NOTHING = 0.01, 0.93
"""C up to which a linear head makes little of the features, and the part of the labels' entropy
that it loses at least where it makes nothing of them."""
EXPONENT = 0.3
"""The default width is C**EXPONENT, of the cross-validated C of a logistic regression."""
ENOUGH_STEPS, STEPS_BY_EXAMPLES = 400, 2 / 3
"""Steps at 1e-3 as far as which a head moves in a shorter training, and those for an example."""
NUM_ROWS = 1000
"""Training examples whose features are looked at."""
NOISE = 1e-4
"""Features that vary by less than this part of their size are one text, but for rounding."""
MOST_COMMON = 1000.0
"""What the mean of a head's input adds up to, at most, in absolute values and scaled: a step of
Adam at 1e-3 moves the logits of all inputs at once by a thousandth of it."""


def scale_head(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    num_steps: int | None = None,
    learning_rate: float | None = None,
) -> float | None:
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
    are no single classes. Features that vary by less than 0.1 are left so where C is at most 0.01
    and yet the regression loses less than 0.93 of the labels' entropy: there is something to learn,
    and not for the head. BaRA's defaults hold KL and noise on A back until the adapter has learned
    it.

    All inputs have the mean of the features in common, along which the logits of all of them move
    at once: a default that had them move by more than 1 in a step at 1e-3 is narrower.

    Where steps are few the default is wider, so that the head moves as far as it would in 400 steps
    at 1e-3, or in 2N/3 of them where N is below 600 and more would learn the examples by heart.
    Steps at smaller learning rates count for less, in proportion.

    Args:
        model: with Bayesian adapters, and their heads in `modules_to_save`.
        batches: training data for the model's forward, with `labels`; the first 1,000 rows are
            used.
        num_steps: optimiser steps in all; None counts as many.
        learning_rate: Adam's, before a schedule changes it; None counts as 1e-3.

    Returns:
        The scale; None where there is no such head, no adapter in training, `head_input_std` is 0,
        all inputs have the same features, or the weight's dtype would round. Heads that see each
        token (token classification, questions, a decoder's `score`) are left alone too, but for a
        decoder's with a `head_input_std` of its own. Where several processes train, all call this
        and have the first one's scale.

    Raises:
        BaraError: no Bayesian adapter, no batches, batches that the model cannot be called with, or
            a weight of which DeepSpeed trains a copy that is out of reach.
    """
    restore_head(model)
    given = None
    for name, adapter in elbo_of(model).adapters.items():
        head = _head(model, name)
        if head is None or adapter.config.head_input_std == 0:
            continue
        trained, original = head
        if not can_set(trained.weight):
            raise BaraError(
                "DeepSpeed trains copies of weights of 16 bits, which are out of reach without "
                "ZeRO: use its stage 1 or 2"
            )
        wanted = adapter.config.head_input_std
        with _frozen_model(model):
            x, labels = head_inputs(
                model, original, batches, NUM_ROWS, at_logits=wanted is not None
            )
        haste = 1.0 if num_steps is None else _haste(adapter.resolved, num_steps, learning_rate)
        found = _of_first_process(_pace(x, labels, wanted, trained.out_features, haste))
        adapter.resolved.frozen_nll = found.frozen_nll
        if found.scale is not None and scale_layer(trained, found.scale):
            given = found.scale
            adapter.resolved.set_by_head(found.pace)
    return given


class Pace(NamedTuple):
    """How quickly a head is to learn.

    Attributes:
        scale: what brings its input to its standard deviation; None where it cannot be told.
        pace: 1, and the standard deviation over `NARROWEST` of a head that is left slow.
        frozen_nll: what a linear head loses on the frozen features, in nats; None where the default
            did not have to know.
    """

    scale: float | None = None
    pace: float = 1.0
    frozen_nll: float | None = None


def _haste(resolved: Resolved, num_steps: int, learning_rate: float | None) -> float:
    """By how much a head has to be quicker than in a long training, at least 1."""
    steps = float(ENOUGH_STEPS)
    if resolved.num_observations is not None:
        steps = min(steps, STEPS_BY_EXAMPLES * resolved.num_observations)
    return max(1.0, steps / max(1.0, resolved.steps(num_steps, learning_rate)))


def _pace(
    x: Tensor,
    labels: Tensor | None,
    std: float | None,
    num_classes: int,
    haste: float = 1.0,
) -> Pace:
    """How quickly a head of this input is to learn.

    Args:
        x, labels: what the head reads, (n, d), and what it is to learn.
        std: what was asked for, or None.
        num_classes: rows of the head's weight.
        haste: by how much the default is quicker than in a long training.
    """
    if x.dim() != 2:
        return Pace()
    found = float((x - x.mean(0)).square().mean().sqrt())
    if not NOISE * float(x.square().mean().sqrt()) < found < math.inf:
        return Pace()
    nll = None
    if std is None:
        best = _linear_head(x, labels, num_classes)
        std = NARROWEST
        if best is not None:
            std, nll = min(WIDEST, max(NARROWEST, best.variance**EXPONENT)), best.nll
            little = best.variance <= LITTLE and nll < NOTHING * _entropy(labels)
            if found < NARROWEST / 2 and little:
                return Pace(_power_of_two(haste), found / NARROWEST, nll)
        common = float(x.mean(0).abs().sum())
        std = min(std * haste, max(1.0, MOST_COMMON / max(common, 1e-12)) * found)
    return Pace(_power_of_two(std / found), 1.0, nll)


def _power_of_two(scale: float) -> float:
    return 2.0 ** round(math.log2(scale))


def _entropy(labels: Tensor | None) -> float:
    """Of the classes' frequencies, in nats."""
    assert labels is not None  # a linear head has read them
    known = labels[labels >= 0]
    return float(torch.special.entr(known.bincount() / len(known)).sum())


def _linear_head(x: Tensor, labels: Tensor | None, num_classes: int) -> CrossValidated | None:
    """What a linear head makes of frozen features; None where labels are no single classes."""
    classes = labels is not None and labels.dim() == 1 and not labels.is_floating_point()
    if labels is None or not classes or len(labels) != len(x) or num_classes < 2:
        return None
    known = (labels >= 0) & (labels < num_classes)
    return cross_validate(x[known], labels[known].long(), num_classes)


def _of_first_process(found: Pace) -> Pace:
    """What the first process found, whose examples may be others: all have one weight."""
    values = [found]
    if several_processes():
        dist.broadcast_object_list(values)
    return values[0]


def scale_head_of(
    model: nn.Module,
    dataloader: DataLoader[Any] | None,
    num_steps: int | None = None,
    learning_rate: float | None = None,
) -> None:
    """`scale_head` with examples from all over a training set, the same for all processes.

    A head whose features cannot be read, such as from batches that only the trainer's own loss
    knows, is left alone with a warning.
    """
    try:
        scale_head(model, _examples(dataloader), num_steps, learning_rate)
    except Exception as error:
        warnings.warn(
            "The head learns as PEFT trains it, at no pace of its own, because its input could not "
            f"be looked at before training: {first_line(error)}. head_input_std=0 says that this "
            "is meant.",
            stacklevel=3,
        )


def read_once(stream: Iterable[Any]) -> bool:
    """Whether a look at a stream takes what it looks at."""
    return iter(stream) is iter(stream)


def _examples(dataloader: DataLoader[Any] | None) -> Iterator[Mapping[str, Any]]:
    """Batches from all over a training set; of a stream its first ones."""
    dataset: Any = getattr(dataloader, "dataset", None)
    if dataloader is None or dataset is None:
        raise BaraError("there is no data set")
    if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
        rows = range(0, len(dataset), -(-len(dataset) // NUM_ROWS))
        size = None if dataloader.batch_sampler is None else dataloader.batch_size or 8
        dataloader = DataLoader(Subset(dataset, rows), size, collate_fn=dataloader.collate_fn)
    elif read_once(dataset):
        raise BaraError("the stream can be read only once")
    yield from dataloader


def _head(model: nn.Module, adapter: str) -> tuple[nn.Linear, nn.Module] | None:
    """The last linear layer of an adapter's trained head, and the base model's that it copies."""
    if generates(adapted_root(model)):
        return None  # its head sees each token
    found = None
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            for path, layer in module.modules_to_save[adapter].named_modules():
                if can_scale(layer) and layer.weight.requires_grad:
                    found = layer, module.original_module.get_submodule(path)
    return found


@contextmanager
def _frozen_model(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, also where training goes on with one that has learned.

    PEFT trains all of an adapter when it enables it again: what is frozen stays frozen.
    """
    peft = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with nullcontext() if peft is None else peft.disable_adapter():
            yield
    finally:
        reshard(model)
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)


@torch.no_grad()
def head_inputs(
    model: nn.Module,
    layer: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    num_rows: int | None = None,
    *,
    at_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What a model gives a layer, in evaluation mode, and the labels beside it; on the CPU.

    Args:
        model: the model.
        layer: one of its modules, called once for a batch.
        batches: for the model's forward, with `labels` or without.
        num_rows: as many are enough; None for all.
        at_logits: of a layer that sees each token the one that the model's logits are of, where
            they are of one (a decoder's `score`).

    Returns:
        The layer's input (n, d), float64, and the labels (n, ...), or None without them. Else of a
        layer that sees each token the first batch's alone, (B, T, d).

    Raises:
        BaraError: there are no batches, one is no mapping, or the model does not call the layer.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    # weights that accelerate has offloaded are on the meta device
    device = next(p.device for p in model.parameters() if not p.is_meta)

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls.append((next(iter((*args, *kwargs.values()))), output))

    hook = layer.register_forward_hook(keep, with_kwargs=True)
    try:
        with evaluating(model):
            for batch in batches:
                if not isinstance(batch, Mapping):
                    raise BaraError(f"a batch is a {type(batch).__name__}, not a mapping of names")
                inputs = dict(batch)
                if isinstance(label := inputs.pop("labels", None), Tensor):
                    labels.append(label.cpu())
                outputs = model(**to_device(inputs, device))
                if not calls:
                    raise BaraError("the model does not call its head")
                x, logits = calls.pop()
                x = _read_positions(x, logits, outputs) if at_logits else x
                rows.append(x.cpu().double())
                if rows[-1].dim() != 2:
                    return rows[-1], None
                if num_rows is not None and sum(map(len, rows)) >= num_rows:
                    break
    finally:
        hook.remove()
    if not rows:
        raise BaraError("scale_head: there are no batches; give those of the training data.")
    x = torch.cat(rows)[:num_rows]
    return x, torch.cat(labels)[:num_rows] if len(labels) == len(rows) else None


def _read_positions(x: Tensor, logits: Tensor, outputs: Any) -> Tensor:
    """A layer's input (B, T, d) at the positions whose logits (B, T, C) the model returns, (B, d);
    the input as it is where that is all of them."""
    returned = getattr(outputs, "logits", None)
    if x.dim() != 3 or returned is None or returned.shape != (len(logits), logits.shape[-1]):
        return x
    same = (logits == returned[:, None].to(logits.dtype)).all(-1)
    return x[torch.arange(len(x)), same.int().argmax(-1)] if same.any(-1).all() else x
