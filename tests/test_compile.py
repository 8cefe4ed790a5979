"""torch.compile: the same loss, KL and gradients, in one graph."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import bara
from bara.adapter.elbo import elbo_of
from bara.posteriors.siblings import SiblingStep
from helpers import CONFIGS, adapt, gradients, stir, tiny_llama, train_log

METHODS = list(CONFIGS)
BACKEND = "aot_eager"  # traces as the default does, and needs no C++ compiler


def texts(rows, length):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 64, (rows, length), generator=generator)
    ids[0, -2:] = 0
    labels = ids.where(ids != 0, -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def model_of(method, **sizes):
    """A model whose layers draw their own noise, as those of a compiled one do."""
    model = stir(adapt(tiny_llama(**{"num_hidden_layers": 1} | sizes), method), 0.1).train()
    bara.set_progress(model, 1.0, 100)
    elbo_of(model).fuse = False
    return model


def step(model, call, batch):
    """Loss, KL terms and gradients of a step whose noise is always the same."""
    torch.manual_seed(3)
    loss = call(**batch).loss
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    return loss.detach(), bara.kl_terms(model), found


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(found[2][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.fixture(autouse=True)
def anew():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_is_the_eager_one_in_one_graph(method):
    model = model_of(method)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=BACKEND)
    for batch in (texts(3, 7), texts(5, 9)):  # the second compiles for any shape
        assert_same(step(twin, compiled, batch), step(model, model, batch))
    assert not counters["graph_break"], dict(counters["graph_break"])


@pytest.mark.parametrize("method", METHODS)
def test_compiled_layers_are_not_fused_besides(method, monkeypatch):
    """A compiler fuses by itself; the graph is one, and every loss is a draw of the same ELBO."""
    monkeypatch.setattr(SiblingStep, "apply", None)
    model = model_of(method)
    elbo_of(model).fuse = True
    found = step(model, torch.compile(model, backend=BACKEND), texts(3, 7))
    assert found[0].isfinite()
    assert all(gradient.isfinite().all() for gradient in found[2].values())
    assert not counters["graph_break"], dict(counters["graph_break"])


@pytest.mark.parametrize("method", ["bara", "balora"])
def test_compiled_blocks_share_their_graphs(method):
    """One for the first block, whose input has no gradient, and one for the others."""
    model = model_of(method, num_hidden_layers=5, use_cache=False)
    twin = copy.deepcopy(model)
    for block in twin.get_base_model().model.layers:
        block.compile(backend=BACKEND)
    assert_same(step(twin, twin, texts(3, 7)), step(model, model, texts(3, 7)))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"], dict(counters["graph_break"])


@pytest.mark.parametrize("method", ["bara", "balora", "blob"])
def test_draws_and_the_mean_are_the_same_in_a_compiled_model(method):
    model = model_of(method).eval()
    compiled = torch.compile(copy.deepcopy(model), backend=BACKEND)
    batch = texts(4, 7)
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
        with bara.sampling(model, num_draws=2, seed=1):
            expected = model(**batch).logits
        with bara.sampling(compiled, num_draws=2, seed=1):
            torch.testing.assert_close(compiled(**batch).logits, expected)


@pytest.mark.parametrize("method", ["bara", "balora"])
def test_gradient_checkpointing_in_a_compiled_model(method):
    model = model_of(method)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    twin = copy.deepcopy(model)
    found = step(twin, torch.compile(twin, backend=BACKEND), texts(3, 7))
    assert_same(found, step(model, model, texts(3, 7)))


def test_trainer_compiles_with_the_kl(tmp_path):
    histories = []
    for compiled in (False, True):
        model = adapt(tiny_llama(), num_observations=None, weight_noise=0.5)
        elbo_of(model).fuse = False
        rows = [
            {name: column[0] for name, column in texts(1, 5 + i % 3).items()} for i in range(24)
        ]
        logged = train_log(
            model,
            rows,
            tmp_path / "out",
            num_train_epochs=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            torch_compile=compiled,
            torch_compile_backend=BACKEND if compiled else None,
        )
        histories.append(logged)
    eager, compiled = histories
    assert len(eager) == len(compiled) == 12
    assert 1 <= counters["stats"]["unique_graphs"] <= 3  # one at first, then for any length
    for ours, theirs in zip(compiled, eager, strict=True):
        for name in ("loss", "kl_global", "kl_local", "effective_rank"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
