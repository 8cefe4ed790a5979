"""Laplace approximation around a trained adapter (Laplace-LoRA, arXiv 2308.13111)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bara.draws.draws import attach_draws, draw_source
from bara.errors import BaraError
from bara.methods.weight_draws import Factors, WeightDraws
from bara.prediction.batches import pad_rows, to_device
from bara.training.trainer import AdapterTrainer

Subset = Literal["adapter", "last-layer"]
Structure = Literal["kron", "diag"]


@dataclass(frozen=True)
class LaplaceOptions:
    """Options of the method `laplace`.

    Attributes:
        subset: the weights with a posterior: `adapter` (all of A and B) or `last-layer` (the last
            trained linear layer, the classifier).
        structure: of the Gauss-Newton matrix: `kron` (Kronecker factors) or `diag`.
        prior_precision: of all these weights, > 0; None maximises the marginal likelihood.
    """

    subset: Subset = "adapter"
    structure: Structure = "kron"
    prior_precision: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("subset", get_args(Subset)), ("structure", get_args(Structure))):
            if getattr(self, name) not in known:
                raise BaraError(
                    f"method laplace: {name} must be one of {', '.join(known)}, "
                    f"not {getattr(self, name)!r}"
                )
        if self.prior_precision is not None and self.prior_precision <= 0:
            raise BaraError("method laplace: prior_precision must be > 0, or null to fit it")


def laplace(
    model: nn.Module, data: Any, options: LaplaceOptions | None = None, *, batch_size: int = 32
) -> float:
    """Gives a trained classifier the Gaussian posterior of the Laplace approximation.

    The generalised Gauss-Newton matrix of the training data comes from laplace-torch. Prediction
    is linearised in the adapter's weights, as the approximation asks for; in the last layer's it
    is linear anyhow.

    Args:
        model: a classifier with a PEFT adapter, or with a trained last layer.
        data: its tokenised training data with labels: rows, as of a `datasets.Dataset`.
        options: which weights, and how their matrix is structured.
        batch_size: rows per forward pass.

    Returns:
        The precision of the prior.

    Raises:
        BaraError: there are no such weights, the model has a posterior already, or it is no
            classifier.
    """
    from laplace import Laplace

    options = options or LaplaceOptions()
    config: Any = getattr(model, "config", None)
    if getattr(config, "problem_type", None) == "regression":
        raise BaraError("method laplace: classification only")
    if draw_source(model) is not None:
        raise BaraError("laplace: this model has a posterior already; give it plain LoRA")
    names = _last_layer(model) if options.subset == "last-layer" else _adapter(model)
    collate = partial(pad_rows, pad_token_id=getattr(config, "pad_token_id", None) or 0)
    loader = DataLoader(data, batch_size=batch_size, collate_fn=collate)
    was_training = model.training  # laplace-torch changes the mode itself
    with _only(model, names):
        approximation: Any = Laplace(
            _Logits(model),
            "classification",
            subset_of_weights="all",
            hessian_structure=options.structure,
            prior_precision=options.prior_precision or 1.0,
        )
        shown = sys.stderr.isatty()
        approximation.fit(loader, progress_bar=shown)
        if options.prior_precision is None:
            approximation.optimize_prior_precision(
                pred_type="glm", method="marglik", progress_bar=shown
            )
    model.train(was_training)
    linearised = options.subset == "adapter"
    attach_draws(model, WeightDraws(model, _factors(model, names, approximation), linearised))
    return float(approximation.prior_precision)


class LaplaceTrainer(AdapterTrainer):
    """Trains LoRA, then fits the posterior on the same data."""

    weight_noise = True

    def finish(self) -> None:
        laplace(self.trained, self.train_dataset, self.options)


class _Logits(nn.Module):
    """A transformers model as laplace-torch calls it: of a batch, giving a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        device = next(self.model.parameters()).device
        return self.model(**to_device(inputs, device))["logits"]


def _adapter(model: nn.Module) -> list[str]:
    names = [name for name, p in model.named_parameters() if "lora_" in name]
    if not names:
        raise BaraError("laplace: the model has no LoRA adapter; use subset='last-layer'")
    return names


def _last_layer(model: nn.Module) -> list[str]:
    """The parameters of the last linear layer that was trained outside of the adapter."""
    layers = {
        name: [f"{name}.{part}" for part, _ in module.named_parameters()]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name and module.weight.requires_grad
    }
    if not layers:
        raise BaraError("laplace: the model has no linear layer that is trained, such as a head")
    return layers[next(reversed(layers))]


@contextmanager
def _only(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Only these parameters require gradients, which is how laplace-torch is told a subset."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def _factors(model: nn.Module, names: list[str], approximation: Any) -> dict[str, Factors]:
    """The covariance that laplace-torch found, by parameter, in the order of its parameters."""
    parameters = [(name, p) for name, p in model.named_parameters() if name in names]
    precision = approximation.posterior_precision
    factors = {}
    if isinstance(precision, Tensor):  # a diagonal
        sizes = [parameter.numel() for _, parameter in parameters]
        for (name, parameter), part in zip(parameters, precision.split(sizes), strict=True):
            rows = (parameter.shape[0], -1) if parameter.dim() > 1 else (-1,)
            factors[name] = Factors(part.reshape(rows).rsqrt().detach())
        return factors
    blocks = zip(
        parameters, precision.eigenvectors, precision.eigenvalues, precision.deltas, strict=True
    )
    for (name, _), vectors, values, delta in blocks:
        eigenvalues = values[0] if len(values) == 1 else torch.outer(*values)
        right = vectors[1].detach() if len(vectors) > 1 else None
        scale = (eigenvalues + delta).rsqrt().detach()
        factors[name] = Factors(scale, vectors[0].detach(), right)
    return factors
