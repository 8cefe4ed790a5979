"""An ensemble of adapters on one shared base model (Lakshminarayanan et al. 2017, 1612.01474)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from bara.draws.draws import Draws, DrawSource
from bara.draws.sharing import lock_of
from bara.errors import BaraError


@dataclass(frozen=True)
class EnsembleOptions:
    """Options of the method `ensemble`.

    Attributes:
        num_members: M, at least 1. Member i trains with the recipe's seed + 1000 i.
    """

    num_members: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.num_members, int) or self.num_members < 1:
            raise BaraError(
                f"method ensemble: num_members must be an integer >= 1, not {self.num_members!r}"
            )


def member_name(index: int) -> str:
    """PEFT's name of member 0, 1, ...: the first is the default adapter."""
    return f"member-{index}" if index else "default"


class EnsembleDraws(DrawSource):
    """The members of an ensemble as its draws: draw d is member d, whatever the seed.

    Args:
        model: a PEFT model with the adapters "default", "member-1", ....
        num_members: M.
    """

    def __init__(self, model: PeftModel, num_members: int) -> None:
        self.model = model
        self.num_members = num_members

    def num_draws(self, wanted: int) -> int:
        return self.num_members

    def in_force(self) -> bool:
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        return not layers or any(not layer.disable_adapters for layer in layers)

    @contextmanager
    def drawing(self, draws: Draws | None) -> Iterator[None]:
        """Member `draws.first` is active, or with None the first one."""
        member = member_name(0 if draws is None else draws.first)
        with lock_of(self.model):
            self.model.set_adapter(member, inference_mode=True)
            try:
                yield
            finally:
                self.model.set_adapter(member_name(0), inference_mode=True)
