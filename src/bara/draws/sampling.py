"""Drawing from the posterior: the context in which forward passes use draws, not the mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from bara.draws.draws import Draws, draw_source
from bara.errors import BaraError


@contextmanager
def sampling(
    model: nn.Module, num_draws: int = 1, seed: int | None = None, *, first_draw: int = 0
) -> Iterator[Draws]:
    """Forward passes inside use `num_draws` fixed draws of the posterior.

    A draw is one consistent model for all inputs, tokens and calls inside the context, generation
    with a cache included. With `num_draws` = S the batch must hold S blocks, draw by draw: the
    inputs repeated S times.

    Args:
        model: a model with a posterior, wrapped or not.
        num_draws: S, at least 1.
        seed: the same seed gives the same draws; None takes one from torch's global generator.
        first_draw: number of the first draw, so that draws can be computed in portions: draws
            0 ... S-1 of a seed do not depend on how many are asked for at a time.

    Raises:
        BaraError: num_draws < 1, no posterior, a batch that S does not divide, or several draws
            from a posterior that gives one at a time (an ensemble, Laplace, TFB, IVON).
    """
    draws = Draws(num_draws, seed, first_draw)
    source = draw_source(model)
    if source is None:
        raise BaraError(
            "This model has no Bayesian adapter, so there is nothing to draw from. Make one with "
            "peft.get_peft_model(model, bara.BaraConfig(...))."
        )
    if num_draws > 1 and not source.batched:
        raise BaraError(
            f"This model gives one draw at a time: use num_draws=1 and first_draw=0 ... "
            f"{num_draws - 1}, or bara.predict."
        )
    with source.drawing(draws):
        yield draws
