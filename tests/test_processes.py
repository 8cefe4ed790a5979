"""Training on several processes: two of them do what one does with the batches of both."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from bara import BaraError, BayesianCallback
from bara.draws.draws import FreshNoise
from helpers import CONFIGS, TinyNet, adapt
from processes import (
    ACCELERATED,
    CASES,
    adapted,
    batch,
    differentiated,
    require_same,
    scale,
    sharded_alone,
    texts,
    told,
    trained,
)

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
ACCELERATE += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]


def two_processes(launcher, folder, *cases):
    """What two processes found that a launcher has started."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(here), *sys.path]),
    }
    command = [sys.executable, *launcher, str(here / "processes.py"), str(folder), *cases]
    launched = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = launched.communicate(timeout=240)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launched.pid, signal.SIGKILL)
    assert launched.returncode == 0, errors[-4000:]
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return two_processes(TORCHRUN, tmp_path_factory.mktemp("torchrun"))


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory):
    """By `accelerate launch`, whose --multi_gpu starts processes without looking for GPUs."""
    return two_processes(ACCELERATE, tmp_path_factory.mktemp("accelerate"), *ACCELERATED)


@pytest.mark.parametrize(
    ("launched", "case"),
    [*(("two", case) for case in CASES), *(("accelerated", case) for case in ACCELERATED)],
)
def test_trainer_with_two_processes_trains_as_with_one(request, tmp_path, launched, case):
    if case == "sft":
        pytest.importorskip("trl")
    expected, found = trained(case, tmp_path, 1), request.getfixturevalue(launched)[case]
    labels = sum(label != -100 for row in texts() for label in row["labels"][1:])
    assert found["n"] == expected["n"] == labels
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-4)


def test_trl_s_trainer_has_the_kl_by_the_callback_alone(accelerated):
    """Its loss is that of `Trainer` on the same rows, which is the model's own ELBO."""
    sft, whole = (accelerated[case] for case in ("sft", "model"))
    assert sft["kl"] == pytest.approx(whole["kl"], rel=1e-3)
    assert sft["loss"] == pytest.approx(whole["loss"], rel=1e-3)


def test_every_process_draws_noise_of_its_own(two):
    noise = two["noise"]  # (processes, kinds, 1000)
    for first, second in noise.unbind(1):
        assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.15
    assert two["states"][0].equal(two["states"][1])  # what trainers draw stays the same in all
    for kind in ("fused", "alone"):
        first, second = torch.tensor(two[kind])
        assert (first - second).abs().max() > 1e-3


def test_heads_of_all_processes_have_one_scale(two):
    first, second = scale(told()), scale(torch.arange(40) % 2)
    assert first != second
    assert two["scales"] == [first, first]


def test_a_lone_process_draws_from_torchs_global_generator():
    torch.manual_seed(7)
    drawn = FreshNoise(5, torch.device("cpu")).normal("", (3,))
    torch.manual_seed(7)
    assert drawn.equal(torch.randn(5, 3))


@pytest.mark.parametrize("method", CONFIGS)
def test_fully_sharded_step_is_the_whole_one(two, method):
    expected = differentiated(adapted(method), batch())
    require_same(two["sharded"][method], expected)
    if method == "bara":
        require_same(two["checkpointed"], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lone_process_can_shard(checkpointing, tmp_path):
    """As tests/test_gpu.py does on a GPU."""
    expected = differentiated(adapted("bara"), batch())
    require_same(sharded_alone("bara", checkpointing, "cpu", tmp_path), expected)


def test_what_would_share_an_input_between_processes_is_refused(tmp_path, monkeypatch):
    model = adapt(TinyNet(), target_modules=["layer"])
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    state, control = TrainerState(max_steps=1), TrainerControl()
    begin = partial(BayesianCallback(10).on_train_begin, arguments, state, control, model=model)
    begin()
    arguments.parallelism_config = SimpleNamespace(tp_size=1, cp_size=2, sp_size=1)
    with pytest.raises(BaraError, match="train with DDP or FSDP2"):
        begin()
    arguments.parallelism_config = None
    monkeypatch.setattr("bara.training.callback.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(BaraError, match="DeepSpeed ZeRO-3"):
        begin()
