"""Causality, cache, padding and packing leave an input's result as it is, in every decoder."""

from contextlib import nullcontext

import pytest
import torch

import bara
from bara.draws.blocks import Blocks
from language_models import adapted_lm

ARCHITECTURES = ["llama", "llama-tied", "qwen2", "gpt2", "mistral", "mixtral"]
LONG = [4, 5, 6, 7, 8, 9, 10, 11]
SHORT = [12, 13, 14]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}

pytestmark = [
    pytest.mark.parametrize("architecture", ARCHITECTURES),
    pytest.mark.parametrize("mode", ["bara", "bara mean", "balora"]),
]


class Forward:
    """The model's logits under two draws, (2, n, T, V), or in mean mode twice the same."""

    def __init__(self, architecture, mode):
        method, _, mean = mode.partition(" ")
        self.model = adapted_lm(architecture, method)
        self.mean = bool(mean)

    @torch.no_grad()
    def output(self, **inputs):
        context = nullcontext() if self.mean else bara.sampling(self.model, num_draws=2, seed=3)
        with context:
            return self.model(**Blocks(2).repeat(inputs))

    def __call__(self, **inputs):
        logits = self.output(**inputs).logits
        return logits.view(2, -1, *logits.shape[1:])

    def alone(self, ids):
        return self(input_ids=torch.tensor([ids]), use_cache=False)[:, 0]


@pytest.fixture
def forward(architecture, mode):
    return Forward(architecture, mode)


def test_the_future_changes_nothing(forward):
    before = forward.alone(LONG)[:, :5]
    after = forward.alone([*LONG[:5], 30, 31, 32])[:, :5]
    torch.testing.assert_close(after, before, **CLOSE)
    if not forward.mean:
        assert (before[0] - before[1]).abs().max() > 1e-3  # the draws do differ


def test_a_cache_changes_nothing(forward):
    whole = forward.alone(LONG)
    cache, parts = None, []
    for start, end in [(0, 3), (3, 6), (6, 7), (7, 8)]:
        ids = torch.tensor([LONG[start:end]])
        output = forward.output(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(forward, side):
    padding = [0] * (len(LONG) - len(SHORT))
    short = [*padding, *SHORT] if side == "left" else [*SHORT, *padding]
    ids = torch.tensor([LONG, short])
    mask = ids.ne(0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = forward(input_ids=ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(logits[:, 0], forward.alone(LONG), **CLOSE)
    own = logits[:, 1, -len(SHORT) :] if side == "left" else logits[:, 1, : len(SHORT)]
    torch.testing.assert_close(own, forward.alone(SHORT), **CLOSE)


def test_packing_changes_nothing(forward):
    ids = torch.tensor([[*LONG, *SHORT]])
    positions = torch.tensor([[*range(len(LONG)), *range(len(SHORT))]])
    logits = forward(input_ids=ids, position_ids=positions, use_cache=False)[:, 0]
    torch.testing.assert_close(logits[:, : len(LONG)], forward.alone(LONG), **CLOSE)
    torch.testing.assert_close(logits[:, len(LONG) :], forward.alone(SHORT), **CLOSE)
