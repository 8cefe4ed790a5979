"""DeepSpeed, which no extra of ours brings: scripts/test-deepspeed.sh installs and runs it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
SCRIPT = Path(__file__).parent / "deepspeed_run.py"
COMMON = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def run(folder, config, *options):
    folder.mkdir(exist_ok=True)
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(config), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    name = "resumed" if "--resume" in options else "trained"
    said = json.loads((folder / f"{name}.json").read_text())
    return load_file(folder / f"{name}.safetensors"), said


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What torch trains without DeepSpeed."""
    return run(tmp_path_factory.mktemp("plain"), {})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_trains_what_torch_does(tmp_path, plain, stage):
    """The head at its pace and the noise where it starts, though ZeRO trains copies of both."""
    tensors, said = run(tmp_path, COMMON | {"zero_optimization": {"stage": stage}})
    assert not said["said"]
    assert said["loss"] == pytest.approx(plain[1]["loss"], rel=1e-5)
    torch.testing.assert_close(tensors, plain[0], rtol=1e-4, atol=1e-6)
    again, _ = run(tmp_path, COMMON | {"zero_optimization": {"stage": stage}}, "--resume")
    torch.testing.assert_close(again, tensors, rtol=1e-4, atol=1e-6)


def test_trains_a_language_model_as_torch_does(tmp_path):
    """With accumulated and recomputed gradients, and the optimiser's state elsewhere."""
    expected, said = run(tmp_path / "plain", {}, "--language")
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    tensors, found = run(tmp_path / "zero", COMMON | {"zero_optimization": zero}, "--language")
    assert found["loss"] == pytest.approx(said["loss"], rel=1e-5)
    torch.testing.assert_close(tensors, expected, rtol=1e-4, atol=1e-6)


def test_trains_copies_of_16_bits(tmp_path, plain):
    config = COMMON | {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    tensors, said = run(tmp_path, config)
    assert not said["said"]
    for name in (n for n in tensors if "noise_logit" in n or "classifier" in n):
        torch.testing.assert_close(tensors[name], plain[0][name], rtol=0.05, atol=1e-3)


def test_copies_out_of_reach_are_left_alone(tmp_path):
    """Without ZeRO nobody reaches DeepSpeed's copies: the head has PEFT's pace, with a warning."""
    config = COMMON | {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}
    tensors, said = run(tmp_path, config)
    assert "out of reach without ZeRO" in said["said"][0]
    noise = [t for name, t in tensors.items() if "noise_logit" in name]
    assert all((t > -0.01).all() for t in noise)  # log(0.5) / 100, as when it was attached
