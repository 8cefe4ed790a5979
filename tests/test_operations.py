"""The number of operations of a training step: what it is now is the most that it may become."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "operations.py"))
BESIDE_LORA = {
    "mc-dropout": -11,
    "scalabl": -11,
    "rankwise": -7,
    "blob": -7,
    "balora": 6,
    "bara": 10,
    "balora, with kernels": -6,
    "bara, with kernels": -6,
}
"""Operations of an adapted layer beyond LoRA's. Fewer than LoRA's own where PEFT casts every
layer's input, weights and gradients one by one, and the fused step all at once."""


@pytest.fixture(scope="module")
def lora():
    return SCRIPT["per_layer"]("lora")


@pytest.mark.parametrize("method", BESIDE_LORA)
def test_a_step_takes_no_more_operations_than_it_did(method, lora):
    if "kernels" in method:
        pytest.importorskip("triton")
    assert SCRIPT["per_layer"](method) - lora <= BESIDE_LORA[method] + 0.5


def test_the_page_has_the_committed_counts():
    assert SCRIPT["section"]() in SCRIPT["PAGE"].read_text("utf-8")
