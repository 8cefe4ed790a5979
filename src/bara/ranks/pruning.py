"""Removing the factors that the task does not use."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from bara.adapter.inspection import (
    adapter_tensors,
    bayesian_adapter,
    copy_sharing_base,
    num_bytes,
    rank_fields,
    trained_heads,
)
from bara.adapter.layer import adapted_layers
from bara.draws.portions import Portions
from bara.errors import BaraError
from bara.evaluation.difference import Difference, difference, token_differences
from bara.language.prompts import generates
from bara.posteriors.bara import BaraPosterior
from bara.posteriors.bara_config import BaraConfig
from bara.posteriors.posterior import Posterior
from bara.posteriors.rank_space import RankSpace, rms_normalised
from bara.prediction.batches import Batch, Collate
from bara.prediction.predict import predict
from bara.ranks.effective_rank import observed_pass, unlabelled_batches

TIMED_PASSES = 5


@dataclass(frozen=True)
class Change:
    """What pruning changed on held-out inputs.

    Attributes:
        mean: between the posterior means of the model before and after.
        draws: between the mixtures of S draws before and after, with different random numbers.
        draws_before: between two mixtures of S draws of the model before, for comparison.
        milliseconds: median time of one forward pass in mean mode, before and after.
        rows: inputs in that pass.
    """

    mean: Difference
    draws: Difference
    draws_before: Difference
    milliseconds: tuple[float, float]
    rows: int


@dataclass(frozen=True, eq=False)
class Pruning:
    """A pruned model and what was taken from it.

    Attributes:
        model: the pruned model. It shares the frozen base weights with the one it was made of.
        inclusion: P(z_k > 0) of the r factors of each layer, before.
        kept: numbers of the factors each layer keeps; empty for a layer without adapter.
        parameters: of the adapter, before and after.
        bytes: of its tensors, before and after.
        change: measured on the held-out inputs; None without them.
    """

    model: PeftModel
    inclusion: dict[str, Tensor]
    kept: dict[str, tuple[int, ...]]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    change: Change | None

    @property
    def removed(self) -> int:
        """Number of factors removed."""
        return sum(len(self.inclusion[name]) - len(kept) for name, kept in self.kept.items())

    def __str__(self) -> str:
        total = sum(map(len, self.inclusion.values()))
        lowest = min(float(p.min()) for p in self.inclusion.values())
        emptied = sum(not kept for kept in self.kept.values())
        lines = [
            f"{self.removed} of {total} factors removed, {emptied} of {len(self.kept)} layers "
            f"without adapter now; the smallest inclusion was {lowest:.3f}",
            "parameters {:,} -> {:,}".format(*self.parameters),
            "bytes {:,} -> {:,}".format(*self.bytes),
        ]
        if self.change is not None:
            before, after = self.change.milliseconds
            lines += [
                f"milliseconds {before:.2f} -> {after:.2f} for {self.change.rows} inputs",
                f"change of the mean: {self.change.mean}",
                f"change of the mixture of draws: {self.change.draws}",
                f"  two mixtures of the model before: {self.change.draws_before}",
            ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        change = None if self.change is None else dict(vars(self.change))
        for name in ("mean", "draws", "draws_before") if change else ():
            change[name] = change[name].to_dict()  # type: ignore[index]
        return {
            "removed": self.removed,
            "kept": {name: list(kept) for name, kept in self.kept.items()},
            "inclusion": {name: p.tolist() for name, p in self.inclusion.items()},
            "parameters": list(self.parameters),
            "bytes": list(self.bytes),
            "change": change,
        }


def prune(
    model: PeftModel,
    data: Any = None,
    *,
    threshold: float = 0.5,
    tolerance: float | None = None,
    held_out: Any = None,
    num_draws: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
) -> Pruning:
    """Removes the factors of a BaRA adapter that the task does not use: P(z_k > 0) < threshold.

    The rest keeps its weights and its scaling. A layer that loses all factors loses its adapter.
    The gates that depend on the input read all r factors of their layer, also those that go; in a
    layer that loses some, they are fitted again by least squares to give on `data`, from the
    factors that stay, the logits they gave before. So what changes is what the removed factors
    contributed, and what that fit leaves; `held_out` measures both.

    Args:
        model: a PEFT model with one BaRA adapter; it is left as it is.
        data: inputs to fit the gates on, as in `bara.effective_rank`; needed where a layer with
            input-dependent gates loses some of its factors.
        threshold: in [0, 1]; 0.5 keeps the median probability model (Barbieri & Berger 2004,
            Annals of Statistics 32(3)).
        tolerance: largest mean distance (see `Difference`) on `held_out` between the posterior
            means before and after; None for any.
        held_out: inputs to measure the change on, read several times in the same order (a language
            model is measured where they have labels); None leaves it unmeasured.
        num_draws, seed: of the draws that are compared.
        batch_size, collate_fn, progress: as in `bara.predict`.

    Raises:
        BaraError: another method's adapter or no global gates, several adapters, a threshold
            outside [0, 1], nothing would be left, a layer with a bias of its own would be emptied,
            data that is missing or cannot be used, or a change beyond the tolerance.
    """
    check_threshold(threshold)
    check_tolerance(tolerance)
    if tolerance is not None and held_out is None:
        raise BaraError("a tolerance needs held-out inputs to check it on: give held_out too")
    inclusion = _inclusion(model)
    adapter = model.active_adapter
    posteriors: dict[str, Any] = {name: p for name, _, p in adapted_layers(model, adapter)}
    kept = {name: (p >= threshold).nonzero().flatten() for name, p in inclusion.items()}
    if not any(len(factors) for factors in kept.values()):
        highest = max(float(p.max()) for p in inclusion.values())
        raise BaraError(
            f"a threshold of {threshold:g} would remove every factor (the largest inclusion is "
            f"{highest:.3f}): give a lower one (--threshold)"
        )
    _require_no_bias_lost(model.peft_config[adapter], kept, threshold)
    fits = {
        posteriors[name]: _GateFit(posteriors[name], factors)
        for name, factors in kept.items()
        if posteriors[name].depends_on_input and 0 < len(factors) < len(inclusion[name])
    }
    if fits:
        if data is None:
            raise BaraError(
                "prune needs data: gates that depend on the input read the factors that go, and "
                "are fitted again to the factors that stay"
            )
        for batch, _ in unlabelled_batches(model, data, batch_size, collate_fn, progress):
            observed_pass(model, batch, _observer(fits))
    pruned = copy_sharing_base(model)
    for name, layer, posterior in list(adapted_layers(pruned, adapter)):
        assert isinstance(posterior, BaraPosterior)
        if len(kept[name]) == 0:
            _remove_layer(pruned, name)
        elif len(kept[name]) < posterior.rank:
            fit = fits.get(posteriors[name])
            _shrink(layer, adapter, posterior, kept[name], fit.solution() if fit else {})
    _update_config(pruned, adapter, removed_layers=any(len(k) == 0 for k in kept.values()))
    options = {"batch_size": batch_size, "collate_fn": collate_fn, "progress": progress}
    change = None
    if held_out is not None:
        change = _measure(model, pruned, held_out, num_draws=num_draws, seed=seed, **options)
        if tolerance is not None and change.mean.mean > tolerance:
            raise BaraError(
                f"pruning at {threshold:g} changes the held-out outputs by {change.mean.mean:.3g} "
                f"on average, more than the tolerance of {tolerance:g}: lower the threshold "
                "(--threshold), give more data (--data), or allow it (--tolerance)"
            )
    tensors = [adapter_tensors(m, adapter) for m in (model, pruned)]
    before, after = (sum(t.numel() for t in part.values()) for part in tensors)
    return Pruning(
        pruned,
        inclusion,
        {name: tuple(factors.tolist()) for name, factors in kept.items()},
        (before, after),
        (num_bytes(tensors[0]), num_bytes(tensors[1])),
        change,
    )


def check_threshold(threshold: float) -> None:
    """Raises BaraError for a threshold outside [0, 1]."""
    if not 0 <= threshold <= 1:
        raise BaraError(f"the threshold must be in [0, 1], got {threshold:g} (--threshold)")


def check_tolerance(tolerance: float | None) -> None:
    """Raises BaraError for a tolerance that is no number from 0 on."""
    if tolerance is not None and not tolerance >= 0:
        raise BaraError(f"the tolerance must be at least 0, got {tolerance:g} (--tolerance)")


def require_removal(model: PeftModel, threshold: float) -> None:
    """Raises BaraError where pruning would remove nothing, or as `prune` for another adapter."""
    lowest = min(float(p.min()) for p in _inclusion(model).values())
    if lowest >= threshold:
        raise BaraError(
            f"nothing to prune: the lowest inclusion is {lowest:.3f}, the threshold {threshold:g} "
            "(--threshold)"
        )


def _inclusion(model: PeftModel) -> dict[str, Tensor]:
    """P(z_k > 0) of the factors of each layer, of an adapter that can be pruned."""
    adapter = bayesian_adapter(model, "prune")
    _require_prunable(model, adapter)
    layers: Any = adapted_layers(model, adapter)
    return {name: p.inclusion().detach().cpu() for name, _, p in layers}


def _require_no_bias_lost(config: Any, kept: Mapping[str, Tensor], threshold: float) -> None:
    emptied = [name for name, factors in kept.items() if len(factors) == 0]
    if emptied and (config.bias == "lora_only" or config.lora_bias):
        option = "bias='lora_only'" if config.bias == "lora_only" else "lora_bias=True"
        raise BaraError(
            f"a threshold of {threshold:g} would remove all factors of {emptied[0]}, and with them "
            f"the bias that {option} trained there: give a lower one (--threshold)"
        )


def _require_prunable(model: PeftModel, adapter: str) -> None:
    config = model.peft_config[adapter]
    if not isinstance(config, BaraConfig) or not config.global_gate:
        raise BaraError(
            f"prune needs a BaRA adapter with global gates; this one's method is "
            f"{config.peft_type}{' without them' if isinstance(config, BaraConfig) else ''}."
        )
    if len(model.peft_config) > 1:
        raise BaraError("prune needs a model with one adapter: delete_adapter the others first.")
    if any(
        getattr(m.lora_B[adapter], "groups", 1) > 1 for _, m, _ in adapted_layers(model, adapter)
    ):
        raise BaraError("prune cannot take factors from the adapter of a grouped convolution.")


class _GateFit:
    """Least squares, for one layer, from the features that stay to what the gates made of all.

    The normal equations are summed up in float64 over the positions that are not padding.
    """

    def __init__(self, posterior: BaraPosterior, kept: Tensor) -> None:
        self.posterior = posterior
        self.kept = kept
        self.gram: Tensor | float = 0.0
        self.cross: dict[str, Tensor | float] = {}

    def add(self, space: RankSpace) -> None:
        posterior, kept = self.posterior, self.kept.to(space.u.device)
        left = rms_normalised(space.pooled(posterior.granularity)[..., kept])
        weights = space.weights if left.shape[1] > 1 else None
        design = nn.functional.pad(_rows(left, weights), (0, 1), value=1.0)
        self.gram = self.gram + design.T @ design
        for name, output in posterior.linear_outputs(space).items():
            target = _rows(output[..., kept], weights)
            self.cross[name] = self.cross.get(name, 0.0) + design.T @ target

    def solution(self) -> dict[str, Tensor]:
        """Weights and, in the last column, biases by name, (r', r' + 1)."""
        assert isinstance(self.gram, Tensor)
        inverse = torch.linalg.pinv(self.gram, hermitian=True)
        return {name: (inverse @ cross).T for name, cross in self.cross.items()}


def _rows(values: Tensor, weights: Tensor | None) -> Tensor:
    """The values of positions that are not padding, (m, r), float64."""
    flat = values.flatten(0, 1) if weights is None else values[weights > 0]
    return flat.double()


def _observer(fits: Mapping[BaraPosterior, _GateFit]) -> Any:
    def observe(layer: str, posterior: Posterior, space: RankSpace) -> None:
        if isinstance(posterior, BaraPosterior) and posterior in fits:
            fits[posterior].add(space)

    return observe


def _shrink(
    layer: Any,
    adapter: str,
    posterior: BaraPosterior,
    kept: Tensor,
    maps: Mapping[str, Tensor],
) -> None:
    """Takes the other factors out of a layer's A, B and posterior."""
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    rank = len(kept)
    a.weight = _parameter(a.weight[kept], a.weight)
    b.weight = _parameter(b.weight[:, kept], b.weight)
    linear = isinstance(a, nn.Linear)
    setattr(a, "out_features" if linear else "out_channels", rank)
    setattr(b, "in_features" if linear else "in_channels", rank)
    scale = math.sqrt if layer.use_rslora[adapter] else float
    layer.r[adapter] = rank
    layer.lora_alpha[adapter] = layer.scaling[adapter] * scale(rank)
    posterior.keep_factors(kept, maps)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(like).clone(), requires_grad=like.requires_grad)


def _remove_layer(model: PeftModel, name: str) -> None:
    holder, _, child = name.rpartition(".")
    parent = model.get_base_model().get_submodule(holder)
    setattr(parent, child, getattr(parent, child).base_layer)
    tuner: Any = model.base_model
    tuner.targeted_module_names.remove(name)


def _update_config(model: PeftModel, adapter: str, removed_layers: bool) -> None:
    config: Any = model.peft_config[adapter]
    layers = {
        name: (layer.r[adapter], layer.scaling[adapter])
        for name, layer, _ in adapted_layers(model, adapter)
    }
    for name, value in rank_fields(layers, config.use_rslora).items():
        setattr(config, name, value)
    config.modules_to_save = trained_heads(config)
    if removed_layers:
        config.target_modules = set(layers)


def _measure(
    before: PeftModel, after: PeftModel, held_out: Any, *, num_draws: int, seed: int, **options: Any
) -> Change:
    mixtures = [
        (before, None, seed),
        (after, None, seed),
        (before, num_draws, seed),
        (before, num_draws, seed + 1),
        (after, num_draws, seed + 1),
    ]
    pairs = [(0, 1), (2, 4), (2, 3)]
    if generates(before):
        drawn = [(model, Portions(model, count, first)) for model, count, first in mixtures]
        mean, draws, draws_before = token_differences(drawn, pairs, held_out, **options)
    else:
        predicted = [
            predict(m, held_out, num_draws=n or 1, deterministic=n is None, seed=s, **options)
            for m, n, s in mixtures
        ]
        mean, draws, draws_before = (difference(predicted[i], predicted[j]) for i, j in pairs)
    batch, index = next(
        unlabelled_batches(before, held_out, options["batch_size"], options["collate_fn"], False)
    )
    milliseconds = _milliseconds(before, after, batch)
    return Change(mean, draws, draws_before, milliseconds, rows=len(index))


def _milliseconds(before: PeftModel, after: PeftModel, batch: Batch) -> tuple[float, float]:
    """Median times of a forward pass; the two take turns, so that the machine's mood is shared."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(TIMED_PASSES):
        for model, seconds in zip((before, after), times, strict=True):
            start = time.perf_counter()
            observed_pass(model, batch, lambda *_: None)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    first, second = (1000 * statistics.median(seconds) for seconds in times)
    return first, second
