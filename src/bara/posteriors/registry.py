"""Every posterior family, by the registration at the end of its own file."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from bara.posteriors import posterior as beside
from bara.posteriors.config import About, BayesianConfig
from bara.posteriors.posterior import Posterior


@dataclass(frozen=True)
class Family:
    """A posterior over adapters.

    Attributes:
        config: its configuration, whose `ABOUT` names it.
        posterior: makes a layer's posterior.
        head: makes of a linear layer and the configuration the posterior that replaces a head; None
            for a family whose heads are PEFT's `modules_to_save`.
    """

    config: type[BayesianConfig]
    posterior: Callable[..., Posterior]
    head: Callable[[nn.Linear, Any], nn.Module] | None = None


FAMILIES: dict[str, Family] = {}
"""All families by name."""
_listeners: list[Callable[[Family], None]] = []


def register(
    config: type[BayesianConfig],
    posterior: Callable[..., Posterior],
    about: About,
    *,
    head: Callable[[nn.Linear, Any], nn.Module] | None = None,
) -> None:
    """Makes a family known: to PEFT, to the table of methods, to the cards.

    Raises:
        ValueError: there is another family of this name.
    """
    known = FAMILIES.get(about.name)
    if known is not None and known.config is not config:
        raise ValueError(f"there is a posterior family {about.name!r} already: {known.config}")
    config.ABOUT = about
    FAMILIES[about.name] = family = Family(config, posterior, head)
    for tell in _listeners:
        tell(family)


def for_each_family(tell: Callable[[Family], None]) -> None:
    """Calls `tell` with every family that is registered, and with each that will be."""
    _listeners.append(tell)
    for family in FAMILIES.values():
        tell(family)


def family_of(config: BayesianConfig) -> Family:
    """The family that a configuration belongs to."""
    return FAMILIES[config.ABOUT.name]


def import_families() -> None:
    """Imports every file beside this one, so that its family registers itself."""
    package = beside.__name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
