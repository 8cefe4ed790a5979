"""PEFT's own probabilistic adapters as they are: MonteCLoRA and PVeRA."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.helpers import MontecloraTrainerMixin
from peft.tuners.pvera.layer import PveraLayer
from torch import nn

from bara.draws.draws import Draws, DrawSource, attach_draws, generator
from bara.draws.sharing import lock_of
from bara.training.trainer import AdapterTrainer


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

    @contextmanager
    def drawing(self, draws: Draws | None) -> Iterator[None]:
        """Layers sample with the numbers of draw 0 of `draws`; with None they take the mean."""
        with lock_of(self.model):
            before = {
                name: (dict(layer.sample_at_inference), dict(layer.pvera_generator))
                for name, layer in self.layers.items()
            }
            try:
                self._set(draws)
                yield
            finally:
                for name, layer in self.layers.items():
                    layer.sample_at_inference, layer.pvera_generator = before[name]

    def _set(self, draws: Draws | None) -> None:
        for name, layer in self.layers.items():
            for adapter in layer.sample_at_inference:
                layer.sample_at_inference[adapter] = draws is not None
                if draws is not None:
                    key = zlib.crc32(name.encode())
                    layer.pvera_generator[adapter] = generator(draws.seed, key, draws.first)


class PveraTrainer(AdapterTrainer):
    """PEFT's PVeRA, whose draws `bara.predict` uses."""

    def finish(self) -> None:
        attach_draws(self.trained, PveraDraws(self.trained))


def monteclora_options(options: dict[str, Any], own: Any) -> dict[str, Any]:
    """Options of `peft.LoraConfig` from its own and a `peft.MontecloraConfig`."""
    return {**options, "monteclora_config": own}
