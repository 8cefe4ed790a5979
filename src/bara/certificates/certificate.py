"""The certificate of an adapter trained in the certified mode (docs/certificates.md)."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from bara.adapter.layer import posteriors
from bara.certificates.bounds import (
    MONTE_CARLO_SHARE,
    complexity_term,
    mean_bound,
    pac_bayes_kl_bound,
)
from bara.draws.blocks import Blocks
from bara.draws.draws import check_draws, source_in_force
from bara.draws.portions import Portions
from bara.draws.sharing import evaluating
from bara.errors import BaraError
from bara.posteriors.certified import (
    PRIOR_STDS,
    CertifiedConfig,
    CertifiedPosterior,
    GaussianLinear,
)
from bara.prediction.batches import Batch, Collate, batches, to_device
from bara.prediction.predictive import check_classes

NUM_PRIORS = len(PRIOR_STDS) ** 2
"""Priors in the union bound: a standard deviation for B and one for the heads."""
COVERED = (".lora_A.", ".lora_B.", ".lora_posterior.", ".lora_head.")
"""Parts of an adapter that a certificate accounts for."""
CLASSIFICATION = "single_label_classification"
"""The `problem_type` of a configuration."""


@dataclass(frozen=True)
class Certificate:
    """A bound on the error rate of one draw of the posterior, and what it is made of.

    Attributes:
        bound: with probability 1 - delta the Gibbs classifier, which draws an adapter for every
            input, errs on at most this part of new inputs.
        gibbs_risk: its error rate on the n examples, estimated from `num_samples` draws.
        gibbs_risk_bound: upper bound on that error rate, for the estimate's own error.
        kl: KL(posterior || prior) of everything that was fitted, in nats.
        num_priors: priors that the union bound covers.
        n: examples that the bound is over.
        delta: probability that the bound fails.
        num_samples: pairs of a draw and an example, all independent.
        majority_error: error rate on the n examples of always answering the most frequent class.
        effective_rank: s_bar, the posterior's mean number of factors in a layer.
        max_rank: mean maximum rank of the layers.
        complexity_effective, complexity_max: `complexity_term` of either rank. They are no part
            of the bound.
    """

    bound: float
    gibbs_risk: float
    gibbs_risk_bound: float
    kl: float
    num_priors: int
    n: int
    delta: float
    num_samples: int
    majority_error: float
    effective_rank: float
    max_rank: float
    complexity_effective: float
    complexity_max: float

    @property
    def verdict(self) -> str:
        """What the bound is worth, in a sentence."""
        if self.bound >= 1 - 1e-9:
            return "The bound is vacuous: it says nothing."
        if self.bound >= self.majority_error:
            return (
                "The bound is no better than always answering the most frequent class, which errs "
                f"on {self.majority_error:.1%} of these examples."
            )
        return (
            "The bound is better than always answering the most frequent class, which errs on "
            f"{self.majority_error:.1%} of these examples."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the verdict."""
        return {**asdict(self), "verdict": self.verdict}


@torch.no_grad()
def certify(
    model: nn.Module,
    data: Any,
    *,
    delta: float = 0.05,
    num_draws: int = 50,
    seed: int = 0,
    batch_size: int = 256,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
) -> Certificate:
    """Bounds the error rate of a classifier with a certified adapter (`CertifiedConfig`).

    Args:
        model: the model, trained.
        data: the labelled examples to certify on: independent of each other and of the prior, and
            of the choice of options. The posterior may have been trained on them. See
            `bara.predict` for the types.
        delta: probability, in (0, 1), that the bound fails.
        num_draws: draws of the posterior for each example, all different.
        seed: of the draws.
        batch_size: rows in one forward pass.
        collate_fn, progress: as in `bara.predict`.

    Raises:
        BaraError: the adapter was not trained in the certified mode, the model is no classifier of
            whole inputs, a label is no class, a number is out of range, or fewer than 8 examples.
    """
    if not 0 < delta < 1:
        raise BaraError(f"delta must be in (0, 1), got {delta}")
    num_draws = check_draws(num_draws)
    layers, _ = fitted(model)
    if source_in_force(model) is None:
        raise BaraError("certify needs the adapter in force: leave disable_adapter()")
    errors, labels = _errors_of_draws(
        model, data, num_draws, seed, batch_size, collate_fn, progress
    )
    n = len(labels)
    risk = errors / (n * num_draws)
    risk_bound = mean_bound(risk, n * num_draws, MONTE_CARLO_SHARE * delta)
    kl = float(kl_divergence(model))
    ranks = [float(layer.posterior.logit().sigmoid().sum()) for layer in layers]
    max_ranks = [layer.posterior.rank for layer in layers]
    widths = [layer.width for layer in layers]
    return Certificate(
        bound=pac_bayes_kl_bound(risk_bound, kl, n, (1 - MONTE_CARLO_SHARE) * delta, NUM_PRIORS),
        gibbs_risk=risk,
        gibbs_risk_bound=risk_bound,
        kl=kl,
        num_priors=NUM_PRIORS,
        n=n,
        delta=delta,
        num_samples=n * num_draws,
        majority_error=1 - max(Counter(labels).values()) / n,
        effective_rank=sum(ranks) / len(ranks),
        max_rank=sum(max_ranks) / len(max_ranks),
        complexity_effective=complexity_term(ranks, max_ranks, widths, n, delta),
        complexity_max=complexity_term(max_ranks, max_ranks, widths, n, delta),
    )


@torch.no_grad()
def kl_divergence(model: nn.Module) -> Tensor:
    """KL(posterior || prior) of a whole certified adapter, a scalar in nats.

    Raises:
        BaraError: the adapter was not trained in the certified mode.
    """
    layers, heads = fitted(model)
    terms = [layer.posterior.kl_of(layer.b) for layer in layers]
    return torch.stack([*terms, *(head.kl() for head in heads)]).cpu().double().sum()


class FittedLayer(NamedTuple):
    """One adapted layer: its posterior, the mean of its B (d_out, r), and d_in + d_out."""

    posterior: CertifiedPosterior
    b: Tensor
    width: int


def fitted(model: nn.Module) -> tuple[list[FittedLayer], list[GaussianLinear]]:
    """Everything that was fitted, after checking that there is nothing else.

    Raises:
        BaraError: the adapter was not trained in the certified mode.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if not isinstance(config, CertifiedConfig):
        raise not_certified()
    assert isinstance(model, PeftModel)
    adapter = model.active_adapter
    for name in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False):
        if not any(part in name for part in COVERED):
            raise BaraError(f"{name} has no posterior, so that the adapter cannot be certified")
    layers, heads = [], []
    for module in model.modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            b = layer.lora_B[adapter].weight
            width = layer.in_features + layer.out_features
            layers.append(FittedLayer(posteriors(layer)[adapter], b, width))
        elif isinstance(module, GaussianLinear):
            heads.append(module)
    return layers, heads


def not_certified() -> BaraError:
    """The error for an adapter of another method."""
    return BaraError(
        "this adapter cannot be certified: parts of it are point estimates, for which there is no "
        "bound. Train one with `bara train --method certified`"
    )


def _errors_of_draws(
    model: nn.Module,
    data: Any,
    num_draws: int,
    seed: int,
    batch_size: int,
    collate_fn: Collate | None,
    progress: bool | None,
) -> tuple[int, list[int]]:
    """Errors among n x num_draws predictions, each with a draw of its own, and the n labels."""
    draws = Portions(model, num_draws, seed, per_input=True)
    device = next(model.parameters()).device
    errors, labels = 0, []
    inputs = max(1, batch_size // num_draws)
    with evaluating(model):
        for batch, _ in batches(data, model, inputs, collate_fn, progress, "certifying"):
            if not isinstance(batch.get("labels"), Tensor):
                raise BaraError("certify needs labelled data: add a `labels` column")
            target = batch.pop("labels").cpu()
            labels += target.flatten().tolist()
            moved = to_device(batch, device)

            def run(blocks: Blocks, moved: Batch = moved, target: Tensor = target) -> int:
                logits = model(**blocks.repeat(moved))["logits"]
                _require_classes(model, logits, target)
                return int((blocks.split(logits.argmax(-1).cpu()) != target).sum())

            errors += sum(draws.map(run, len(target), batch_size))
    return errors, labels


def _require_classes(model: nn.Module, logits: Tensor, labels: Tensor) -> None:
    """Refuses what has no errors to count: anything but one class of several for each input."""
    config: Any = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None) or CLASSIFICATION
    if logits.dim() != 2 or logits.shape[1] < 2 or labels.dim() != 1 or problem != CLASSIFICATION:
        raise BaraError(
            "a certificate bounds the error rate of a classifier with one class for each input: "
            "a regression, several labels, or a class for each word has none"
        )
    check_classes(labels, logits.shape[1])
