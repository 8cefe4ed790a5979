"""Drawing from the posterior: the context in which forward passes use draws, not the mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from bara.draws import Draws
from bara.training import elbo_of


@contextmanager
def sampling(
    model: nn.Module, num_draws: int = 1, seed: int | None = None, *, first_draw: int = 0
) -> Iterator[Draws]:
    """Forward passes inside use `num_draws` fixed draws of the posterior.

    A draw is one consistent model for all inputs, tokens and calls inside the context, generation
    with a cache included. With `num_draws` = S the batch must hold S blocks, draw by draw: the
    inputs repeated S times.

    Args:
        model: a model with a Bayesian adapter, wrapped or not.
        num_draws: S, at least 1.
        seed: the same seed gives the same draws; None takes one from torch's global generator.
        first_draw: number of the first draw, so that draws can be computed in portions: draws
            0 ... S-1 of a seed do not depend on how many are asked for at a time.

    Raises:
        BaraError: num_draws < 1, no Bayesian adapter, or a batch that S does not divide.
    """
    draws = Draws(num_draws, seed, first_draw)
    with elbo_of(model).drawing(draws):
        yield draws
