"""The Triton kernels compute what PyTorch does: on a GPU, else in Triton's interpreter."""

import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from itertools import product

import pytest
import torch
from torch import nn

import test_fused
from bara.draws.draws import Draws
from bara.posteriors.balora_step import BaloraStep
from bara.posteriors.bara_step import BaraStep
from bara.posteriors.kernels import on_device as kernels
from helpers import stir
from test_fused import assert_alike, classifier, language_model, step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")
blocks = pytest.importorskip("bara.posteriors.kernels.blocks")

# past the end of what there is: not written
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
STEPS = [
    BaraStep(gate, noise, pool)
    for gate, noise, pool in product([True, False], repeat=3)
    if gate or not pool
] + [BaloraStep(pool=True), BaloraStep(pool=False)]


@pytest.fixture
def kernels_here(monkeypatch):
    """Lets the fused step take them on a CPU too."""
    monkeypatch.setattr(kernels, "DEVICES", ("cpu", "cuda"))
    kernels.checked.cache_clear()
    yield
    kernels.checked.cache_clear()


def numbers(function, positions, rank, weighted):
    """u, s, the positions' weights, the tensors, and the gradients of what comes out, float64."""
    generator = torch.Generator().manual_seed(1)
    layers, inputs = 2, 3

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u = normal(layers, inputs, positions, rank)
    s = normal(*u.shape).square() + 0.01 if getattr(function, "noise", True) else None
    weights = None
    if weighted:
        weights = normal(inputs, positions).exp()
        weights[0, (positions + 1) // 2 :] = 0  # padding
        weights /= weights.sum(1, keepdim=True)
    e, groups = normal(layers, inputs, 1, rank), 1 if function.pool else positions
    if isinstance(function, BaloraStep):
        shapes = [(layers, 5, rank), (layers, 5), (layers, 1, 5), (layers, 1)]
        tensors = [e, *(normal(*shape) for shape in shapes)]
        dpart = normal(layers, inputs, groups, 1)
    else:
        m, offset = normal(layers, inputs, 1, rank), normal(layers, inputs, 1, rank)
        gate = [offset, normal(layers, rank, rank).mT] if function.gate else []
        tensors = [m * 1.2, e, m, *gate]
        dpart = normal(layers, inputs, groups, rank) if function.gate else None
    return u, s, weights, tensors, normal(*u.shape), dpart


def computed(function, u, s, weights, tensors, dy, dpart):
    y, part, saved = function.forward(u, s, weights, tensors)
    du, ds, gradients = function.backward(saved, dy, dpart)
    return y, part, du, ds, *gradients


def name_of(function):
    return "bara" if isinstance(function, BaraStep) else "balora"


def as_kernel(function):
    return import_module(f"bara.posteriors.kernels.{name_of(function)}").kernel(function)


def placed(values, dtype):
    """On the device, those of the size of u in `dtype`, the rest in float32."""
    u, s, weights, tensors, dy, dpart = values

    def put(tensor, to=torch.float32):
        return None if tensor is None else tensor.to(DEVICE, to)

    tensors = [put(tensor) for tensor in tensors]
    return put(u, dtype), put(s, dtype), put(weights), tensors, put(dy, dtype), put(dpart)


@pytest.mark.parametrize(("positions", "rank"), [(1, 8), (7, 5), (70, 16), (20, 64)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("function", STEPS, ids=str)
def test_values_and_gradients_are_those_of_64_bits(function, weighted, positions, rank):
    """Of PyTorch's form, whose derivative `test_fused` holds against finite differences."""
    values = numbers(function, positions, rank, weighted)
    expected = computed(function, *values)
    found = computed(as_kernel(function), *placed(values, torch.float32))
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
            continue
        assert one.dtype == torch.float32
        size = float(other.abs().max())
        torch.testing.assert_close(one.cpu().double(), other, rtol=0, atol=3e-6 * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [STEPS[0], STEPS[-1]], ids=str)
def test_half_precision_is_rounded_once(function, dtype):
    """What goes in is rounded; what comes out differs from 64 bits on the same by a rounding."""
    rounded = placed(numbers(function, 40, 8, True), dtype)
    u, s, weights, tensors, dy, dpart = (
        [t.double().cpu() for t in value] if isinstance(value, list) else value.double().cpu()
        for value in rounded
    )
    found = computed(as_kernel(function), *rounded)
    wide = computed(function, u, s, weights, tensors, dy, dpart)
    for number, (one, other) in enumerate(zip(found, wide, strict=True)):
        if other is None:
            continue
        assert one.dtype == (dtype if number in (0, 2, 3) else torch.float32)  # y, du, ds
        epsilon = torch.finfo(one.dtype).eps
        tolerance = {"rtol": epsilon, "atol": 1e-5 * float(other.abs().max())}
        torch.testing.assert_close(one.cpu().double(), other, **tolerance)


@pytest.mark.parametrize("function", [STEPS[2], STEPS[-1]], ids=str)
def test_the_same_numbers_give_the_same_bits(function):
    given = placed(numbers(function, 130, 16, True), torch.float32)
    pairs = zip(*(computed(as_kernel(function), *given) for _ in range(2)), strict=True)
    assert all(one is None or torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("make", "method", "options"),
    [
        (classifier, "bara", {}),
        (classifier, "bara", {"local_gate": False}),
        (language_model, "bara", {}),
        (classifier, "balora", {}),
        (language_model, "balora", {"hidden_size": 3}),
    ],
)
def test_a_model_trains_as_without(make, method, options, kernels_here, monkeypatch):
    """As 64 bits do, to what 32 bits round."""
    # so little that the attention does not saturate, where much is made of a rounding
    monkeypatch.setattr(test_fused, "stir", partial(stir, scale=0.05))
    model, batch = make(method, **options)
    model.to(DEVICE)
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    launched, launch = [], blocks.launch

    def recorded(kernel, *args, **sizes):
        launched.append(kernel.fn.__name__)
        launch(kernel, *args, **sizes)

    draws = Draws(2, seed=5)
    monkeypatch.setattr(blocks, "launch", recorded)
    by_kernels = step(model, batch, fuse=True, draws=draws)
    assert launched.count("_forward") == launched.count("_backward") > 4
    launched.clear()
    monkeypatch.setenv(kernels.VARIABLE, "0")
    truth = step(model.double(), batch, fuse=True, draws=draws)
    assert not launched
    assert_alike(by_kernels, truth, 1e-4)


@pytest.mark.parametrize("method", ["bara", "balora"])
def test_inputs_of_zeros_have_gradients(method, kernels_here):
    model, batch = classifier(method, granularity="token")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.zero_()
                module.bias.zero_()
    model.to(DEVICE)
    values = step(model, {name: value.to(DEVICE) for name, value in batch.items()}, fuse=True)
    assert all(value.isfinite().all() for value in values.values())


# -- where they are not taken -----------------------------------------------------------------

STEP = BaraStep(gate=True, noise=True, pool=False)


def chosen(rank=8, dtype=torch.float32, device=DEVICE):
    _, _, _, tensors, _, _ = numbers(STEP, 3, rank, False)
    return kernels.on_device(STEP, "bara", [tensor.to(device) for tensor in tensors], dtype)


def test_pytorch_keeps_what_kernels_do_not_serve(kernels_here, monkeypatch):
    assert type(chosen()).__name__ == "BaraKernel"
    assert chosen(dtype=torch.float64) is chosen(rank=kernels.WIDEST + 1) is STEP
    monkeypatch.setenv(kernels.VARIABLE, "0")
    assert chosen() is STEP


def test_a_cpu_has_none():
    assert chosen(device="cpu") is STEP


def test_without_triton_nothing_is_said(kernels_here, monkeypatch, recwarn):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert chosen() is STEP
    assert not recwarn.list


def test_kernels_that_cannot_be_built_are_named_once(kernels_here, monkeypatch, recwarn):
    def fails(*args, **more):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(blocks, "launch", fails)
    with pytest.warns(RuntimeWarning, match=r"of bara are not used on .*find C compiler\.\)"):
        assert chosen() is STEP
    recwarn.clear()
    assert chosen() is STEP
    assert not recwarn.list


def test_kernels_that_compute_something_else_are_not_used(kernels_here, monkeypatch):
    launch = blocks.launch

    def spoilt(kernel, grid, *given, **sizes):
        launch(kernel, grid, *given, **sizes)
        if kernel.fn.__name__ == "_backward":
            du = given[-4]
            du *= 1.01

    monkeypatch.setattr(blocks, "launch", spoilt)
    with pytest.warns(RuntimeWarning, match=r"they differ from PyTorch's by 1e-02"):
        assert chosen() is STEP


# -- built for GPUs that are not here ---------------------------------------------------------

BUILD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bara.posteriors.kernels import balora, bara

HALF, NUMBERS = {"u", "s", "y", "dy", "du", "ds"}, {"inputs", "positions", "span"}
for kernel in (bara._forward, bara._backward, balora._forward, balora._backward):
    for pool, half, rank, width, rows in ((False, "bf16", 64, 64, 16), (True, "fp16", 8, 16, 64)):
        sizes = dict(R=rank, W=width, N=rows, POOL=pool, H=rank, V=width)
        sizes |= dict.fromkeys(("GATE", "NOISE", "WEIGHTED", "PART"), True)
        sizes = {name: sizes[name] for name in kernel.arg_names if name in sizes}
        types = {name: f"*{half if name in HALF else 'fp32'}" for name in kernel.arg_names}
        types |= dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(sizes, "constexpr")
        target = GPUTarget("cuda", CAPABILITY, 32)
        source = ASTSource(kernel, types, sizes)
        built = triton.compile(source, target=target, options={"num_stages": 1})
        assert built.asm["cubin"]
        print(built.metadata.shared)
"""


@pytest.mark.parametrize("capability", [75, 90])
def test_they_can_be_built_for_a_gpu(capability, tmp_path):
    """Down to its machine code, with less shared memory than the smallest of them has (64 KiB)."""
    code = BUILD.replace("CAPABILITY", str(capability))
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=variables,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    shared = [int(line) for line in ran.stdout.split()]
    assert len(shared) == 8
    assert max(shared) <= 64 * 1024
