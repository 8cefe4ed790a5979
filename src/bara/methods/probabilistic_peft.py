"""PEFT's own probabilistic adapters as they are: MonteCLoRA and PVeRA."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.helpers import MontecloraTrainerMixin
from peft.tuners.pvera.layer import PveraLayer
from torch import nn

from bara.adapter.inspection import passed_by
from bara.draws.draws import Draws, DrawSource, attach_draws, generator
from bara.draws.sharing import lock_of
from bara.training.trainer import AdapterTrainer

EACH_ADAPTER = "pvera_generator" in PveraLayer.other_param_names
"""Whether PVeRA's layers have a switch and a generator per adapter; PEFT 0.20 has one of each."""
GENERATOR = "pvera_generator" if EACH_ADAPTER else "generator"


class MontecloraTrainer(MontecloraTrainerMixin, AdapterTrainer):  # type: ignore[misc]
    """Adds MonteCLoRA's regulariser to the loss. PEFT predicts with the mean alone."""


class PveraDraws(DrawSource):
    """Draws of PVeRA's latent activations.

    They are PEFT's: one for every token, so that a draw of a text depends on its place in the
    batch and on the batch's padding. Seeds make the same batches give the same draws.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, PveraLayer)}

    def in_force(self) -> bool:
        return not all(map(passed_by, self.layers.values()))

    @contextmanager
    def drawing(self, draws: Draws | None) -> Iterator[None]:
        """Layers sample with the numbers of draw 0 of `draws`; with None they take the mean."""
        with lock_of(self.model):
            before = {
                name: (layer.sample_at_inference, getattr(layer, GENERATOR))
                for name, layer in self.layers.items()
            }
            try:
                self._set(draws)
                yield
            finally:
                for name, layer in self.layers.items():
                    layer.sample_at_inference, numbers = before[name]
                    setattr(layer, GENERATOR, numbers)

    def _set(self, draws: Draws | None) -> None:
        for name, layer in self.layers.items():
            layer.sample_at_inference = _of_all_adapters(layer, draws is not None)
            if draws is not None:
                numbers = generator(draws.seed, zlib.crc32(name.encode()), draws.first)
                setattr(layer, GENERATOR, _of_all_adapters(layer, numbers))


def _of_all_adapters(layer: Any, value: Any) -> Any:
    return dict.fromkeys(layer.sample_at_inference, value) if EACH_ADAPTER else value


class PveraTrainer(AdapterTrainer):
    """PEFT's PVeRA, whose draws `bara.predict` uses."""

    def finish(self) -> None:
        attach_draws(self.trained, PveraDraws(self.trained))


def monteclora_options(options: dict[str, Any], own: Any) -> dict[str, Any]:
    """Options of `peft.LoraConfig` from its own and a `peft.MontecloraConfig`."""
    return {**options, "monteclora_config": own}
