"""The number of operations of a training step: what it is now is the most that it may become."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "operations.py"))
BESIDE_LORA = {
    "mc-dropout": 10,
    "scalabl": 21,
    "rankwise": 69,
    "blob": 52,
    "balora": 66,
    "bara": 101,
}
"""Operations of an adapted layer beyond LoRA's; the goal is 30 for BaRA and 16 for BaLoRA."""


@pytest.fixture(scope="module")
def lora():
    return SCRIPT["per_layer"]("lora")


@pytest.mark.parametrize("method", BESIDE_LORA)
def test_a_step_takes_no_more_operations_than_it_did(method, lora):
    assert SCRIPT["per_layer"](method) - lora <= BESIDE_LORA[method] + 0.5


def test_the_page_has_the_committed_counts():
    assert SCRIPT["section"]() in SCRIPT["PAGE"].read_text("utf-8")
