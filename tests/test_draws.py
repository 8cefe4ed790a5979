"""Draws are reproducible and depend on nothing but seed, layer and number."""

import pytest
import torch

from bara import BaraError
from bara.draws.draws import Draws

CPU = torch.device("cpu")


def test_same_seed_same_draws_and_other_seed_or_layer_others():
    first = Draws(3, seed=7).numbers("layer/eps", "normal", (5,), CPU)
    torch.testing.assert_close(first, Draws(3, seed=7).numbers("layer/eps", "normal", (5,), CPU))
    assert not torch.equal(first, Draws(3, seed=8).numbers("layer/eps", "normal", (5,), CPU))
    assert not torch.equal(first, Draws(3, seed=7).numbers("other/eps", "normal", (5,), CPU))


def test_a_draw_does_not_depend_on_how_many_are_asked_for():
    ten = Draws(10, seed=0).numbers("l/z", "uniform", (40,), CPU)
    torch.testing.assert_close(ten[:4], Draws(4, seed=0).numbers("l/z", "uniform", (40,), CPU))
    later = Draws(3, seed=0, first=4).numbers("l/z", "uniform", (40,), CPU)
    torch.testing.assert_close(ten[4:7], later)


def test_neighbouring_seeds_layers_and_draws_are_uncorrelated():
    numbers = torch.cat(
        [Draws(4, seed=s).numbers(f"l{i}", "normal", (2000,), CPU) for s in (0, 1) for i in (0, 1)]
    )
    correlation = torch.corrcoef(numbers) - torch.eye(len(numbers))
    assert correlation.abs().max() < 5 / 2000**0.5
    assert abs(numbers.mean()) < 0.03
    assert abs(numbers.std() - 1) < 0.03


def test_no_seed_takes_one_from_the_global_generator():
    torch.manual_seed(3)
    seed = Draws(1).seed
    torch.manual_seed(3)
    assert Draws(1).seed == seed
    assert Draws(1).seed != seed


def test_bad_numbers_are_refused():
    with pytest.raises(BaraError, match="num_draws must be at least 1, got 0"):
        Draws(0)
    with pytest.raises(BaraError, match=r"num_draws must be a whole number, got 1000.0"):
        Draws(1e3)
    with pytest.raises(BaraError, match="7 rows cannot hold 2 draws"):
        Draws(2).rows(7, CPU)
