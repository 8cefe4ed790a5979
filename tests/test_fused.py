"""The fused step computes what the layers compute on their own, values and gradients."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertForSequenceClassification

import bara
from bara.adapter.elbo import elbo_of
from bara.draws.draws import Draws
from bara.draws.noise_stack import FreshNoiseStack
from bara.posteriors.balora import BaloraStep
from bara.posteriors.bara import BaraPosterior
from bara.posteriors.bara_step import BaraStep
from bara.posteriors.fused import FusedLayer
from bara.posteriors.rank_functions import Multiplied, Plain, Signed
from bara.posteriors.rank_space import SharedInput
from bara.posteriors.siblings import Siblings
from conftest import tiny_bert_config
from helpers import CONFIGS, TinyConv, adapt, gradients, stir, tiny_llama

FUSED = [method for method in CONFIGS if method != "clora"]
FIXED = ("bara", "balora", "scalabl", "sgp-lora")
"""Families whose fused step serves fixed draws too; the others draw a matrix for each."""


@pytest.fixture
def steps(monkeypatch):
    """Counts the layers that took the fused step."""
    taken = []
    call = FusedLayer.__call__

    def counted(layer, *args):
        taken.append(layer.siblings.function)
        return call(layer, *args)

    monkeypatch.setattr(FusedLayer, "__call__", counted)
    return taken


def language_batch():
    ids = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 4:] = mask[3, 2:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def language_model(method, **options):
    model = adapt(tiny_llama(), method, target_modules="all-linear", **options)
    return stir(model).train(), language_batch() | {"labels": language_batch()["input_ids"]}


def classifier(method, **options):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        tiny_bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    targets = ["query", "key", "value", "dense"]
    model = adapt(model, method, task_type="SEQ_CLS", target_modules=targets, **options)
    batch = language_batch()
    batch["input_ids"] = batch["input_ids"].clamp_max(model.config.vocab_size - 1)
    return stir(model).train(), batch | {"labels": torch.tensor([0, 1, 1, 0])}


def step(model, batch, *, fuse, draws=None, autocast=None):
    """The loss, the outputs and all gradients of one step."""
    elbo = elbo_of(model)
    elbo.fuse = fuse
    model.zero_grad()
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with elbo.drawing(draws), context:
        outputs = model(**batch)
    outputs["loss"].backward()
    elbo.fuse = True
    values = {"loss": outputs["loss"], "logits": outputs["logits"]}
    return {name: value.detach().double() for name, value in (values | gradients(model)).items()}


def assert_alike(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        size = other[name].abs().max().clamp_min(1e-12)
        assert float((value - other[name]).abs().max() / size) < tolerance, name


OPTIONS = [
    ("bara", {}),
    ("bara", {"granularity": "token"}),
    ("bara", {"local_gate": False}),
    ("bara", {"global_gate": False, "factor_noise": False}),
    ("bara", {"weight_noise": 0.0}),
    ("bara", {"weight_noise": 0.0, "local_gate": False, "global_gate": False}),
    ("bara", {"rank_pattern": {"query": 2}, "alpha_pattern": {"key": 3}}),
    ("balora", {}),
    ("balora", {"granularity": "token", "hidden_size": 3}),
    ("scalabl", {}),
]


@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_a_classifier_trains_as_without(method, options, steps):
    model, batch = classifier(method, **options)
    draws = Draws(2, seed=5)
    fused = step(model.double(), batch, fuse=True, draws=draws)
    assert len(steps) == 13
    assert_alike(fused, step(model, batch, fuse=False, draws=draws), 1e-6)
    assert len(steps) == 13


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("padded", [True, False])
def test_a_language_model_trains_as_without(method, padded, steps):
    model, batch = language_model(method)
    if not padded:
        batch.pop("attention_mask")
    draws = Draws(2, seed=5)
    fused = step(model.double(), batch, fuse=True, draws=draws)
    assert len(steps) == 14
    assert_alike(fused, step(model, batch, fuse=False, draws=draws), 1e-6)


def test_gates_on_inputs_of_zeros_have_gradients():
    model, batch = classifier("bara", granularity="token")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.zero_()
                module.bias.zero_()
    draws = Draws(2, seed=5)
    fused = step(model, batch, fuse=True, draws=draws)
    assert all(value.isfinite().all() for value in fused.values())
    alone = step(model, batch, fuse=False, draws=draws)
    for name, value in fused.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "scale"),
    # not sgp-lora at 1: its noise then saturates the attention, where a rounding decides
    [case for case in product(FIXED, [0.05, 0.3, 1.0]) if case != ("sgp-lora", 1.0)],
)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_without(method, scale):
    """Whatever the gates: both are held against 64-bit numbers."""
    torch.manual_seed(0)
    model = adapt(tiny_llama(), method, target_modules="all-linear")
    batch = language_batch() | {"labels": language_batch()["input_ids"]}
    draws = Draws(2, seed=5)
    stir(model.train(), scale)
    half = step(model, batch, fuse=True, draws=draws, autocast=torch.bfloat16)
    alone = step(model, batch, fuse=False, draws=draws, autocast=torch.bfloat16)
    truth = step(model.double(), batch, fuse=False, draws=draws)

    def error(values):
        return sum(
            float((values[n] - t).norm() / t.norm().clamp_min(1e-6)) for n, t in truth.items()
        )

    assert error(half) < 1.1 * error(alone) + 1e-3


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", FUSED)
def test_dtypes_come_back_as_they_went_in(method, base, steps):
    torch.manual_seed(0)
    model = adapt(tiny_llama().to(base), method, target_modules="all-linear")
    batch = language_batch() | {"labels": language_batch()["input_ids"]}
    stir(model.train())
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        torch.manual_seed(1)
        with context:
            outputs = model(**batch)
        outputs.loss.backward()
        assert outputs.logits.dtype == (
            base if isinstance(context, nullcontext) else torch.bfloat16
        )
        assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)
        assert all(g.isfinite().all() for g in gradients(model).values())
    assert len(steps) == 28


# -- the written derivatives against finite differences ---------------------------------------


def tensors_of(function, k, b, r):
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn((k, *shape), generator=generator, dtype=torch.float64)

    if isinstance(function, BaraStep):
        m = normal(b, 1, r)
        gate = [normal(b, 1, r), normal(r, r)] if function.gate else []
        return [m * 1.2, normal(b, 1, r), m, *gate], 2
    if isinstance(function, BaloraStep):
        return [normal(b, 1, r), normal(5, r), normal(5), normal(1, 5), normal(1)], 1
    if isinstance(function, Multiplied):
        return [normal(b, 1, r)], 0
    return ([normal(b, 1, r).sign()], 1) if isinstance(function, Signed) else ([], 0)


FUNCTIONS = {
    "bara token": BaraStep(gate=True, noise=True, pool=False),
    "bara sequence": BaraStep(gate=True, noise=True, pool=True),
    "bara without noise on A": BaraStep(gate=True, noise=False, pool=False),
    "bara without gate": BaraStep(gate=False, noise=True, pool=False),
    "bara without either": BaraStep(gate=False, noise=False, pool=False),
    "balora token": BaloraStep(pool=False),
    "balora sequence": BaloraStep(pool=True),
    "multiplied": Multiplied(),
    "signed": Signed(),
    "plain": Plain(),
}


@pytest.mark.parametrize("places", [[0], [0, 1], [0, 2], [1]], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(name, weighted, places):
    """Of one layer, of siblings that read the same or in part, and of one that reads it alone."""
    function, b, t, d_in, d_out, r = FUNCTIONS[name], 2, 3, 4, 5, 3
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    siblings = 1 if places == [0] else 3
    tensors, constant = tensors_of(function, siblings, b, r)
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).double() if weighted else None
    signs = normal(b, 1, d_in).sign()
    mask = normal(b, 1, d_in).gt(0).double()
    matrices = normal(siblings, r, d_in).unbind()
    # BaLoRA's features have no gradient: only what is behind them is compared
    stops = isinstance(function, BaloraStep)
    noiseless = not (stops or getattr(function, "noise", False))

    def layer(x, result, a, b_weight, *differentiable):
        signed, squares = isinstance(function, Signed), () if noiseless else (a * a.detach(),)
        read_together = Siblings(
            function=function,
            tensors=(*tensors[:constant], *differentiable),
            a=a,
            rank=r,
            seconds=matrices if signed else squares,
            signs=(signs,) * siblings if signed else (),
            mask=mask if isinstance(function, Plain) else None,
        )
        shared = SharedInput(x)
        for place in places:
            fused = FusedLayer(read_together, place, b_weight)
            result, parts = fused(shared, b, weights, result)
        return result, *(part for part in parts.values() if part.requires_grad)

    inputs = [normal(b, t, d_in), normal(b, t, d_out)]
    inputs += [normal(siblings * r, d_in), normal(d_out, r)]
    inputs = [x.requires_grad_(not (stops and i in (0, 2))) for i, x in enumerate(inputs)]
    inputs += [tensor.clone().requires_grad_() for tensor in tensors[constant:]]
    assert torch.autograd.gradcheck(layer, inputs)


# -- fresh noise ------------------------------------------------------------------------------


def recorded(draw, drawn):
    def record(self, *args):
        numbers = draw(self, *args)
        drawn.setdefault(draw.__name__, []).append(numbers)
        return numbers

    return record


@pytest.mark.parametrize("method", ["blob", "rankwise", "mc-dropout"])
def test_noise_of_a_matrix_is_what_its_formula_says(method, monkeypatch):
    """The layer's output from the numbers that were drawn, by the formula, and its gradients."""
    model, batch = classifier(method, granularity="token", r=3)
    drawn = {}
    for name in ("shared", "sign_of", "uniform_of"):
        monkeypatch.setattr(FreshNoiseStack, name, recorded(getattr(FreshNoiseStack, name), drawn))
    base = model.get_base_model()
    module = base.bert.encoder.layer[0].attention.self.query
    seen = {}
    module.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    torch.manual_seed(3)
    model(**batch)
    x, out = seen["x"], seen["out"]
    a, b = module.lora_A.default.weight, module.lora_B.default.weight
    posterior = module.lora_posterior.default
    shape = torch.Size((len(x), 1, x.shape[-1]))  # the first layer is first in its stack
    u = x @ a.mT
    if method == "mc-dropout":
        keep = drawn["uniform_of"][0][0].unsqueeze(1) >= posterior.config.dropout_rate
        u = (x * keep / (1 - posterior.config.dropout_rate)) @ a.mT
    else:
        std = posterior.std() if method == "blob" else posterior.std().unsqueeze(1)
        signs, of_factors = (
            drawn["sign_of"][0][0].unsqueeze(1),
            drawn["sign_of"][-1][0].unsqueeze(1),
        )
        assert signs.shape == shape
        u = u + ((x * signs) @ (std * drawn["shared"][0][0]).mT) * of_factors
    expected = module.base_layer(x) + module.scaling["default"] * (u @ b.mT)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    leaves = [a, b, *posterior.parameters()]
    for one, other in zip(
        torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", FUSED)
def test_fresh_noise_differs_by_step_layer_and_input_and_follows_the_seed(method, steps):
    model, batch = classifier(method)

    def logits(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(**batch).logits

    assert torch.equal(logits(0), logits(0))
    assert not torch.allclose(logits(0), logits(1))
    assert steps
    batch = {name: value[:1].repeat(4, *[1] * (value.dim() - 1)) for name, value in batch.items()}
    assert not torch.allclose(logits(0)[0], logits(0)[1])


@pytest.mark.parametrize("method", FUSED)
def test_checkpointed_blocks_compute_the_same(method, steps):
    """With dropout in the base model, whose random numbers a block repeats."""
    model, batch = language_model(method)
    model.config.attention_dropout = 0.2
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2

    def run():
        model.zero_grad()
        torch.manual_seed(7)
        loss = model(**batch).loss
        loss.backward()
        return {"loss": loss.detach().double()} | {
            name: value.double() for name, value in gradients(model).items()
        }

    plain = run()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = len(steps)
    assert_alike(run(), plain, 1e-5)
    assert len(steps) - before == 28


# -- layers that read the same input ------------------------------------------------------------


@pytest.fixture
def nodes(monkeypatch):
    """The number of layers of every node between A and B."""
    sizes = []
    call = Siblings.__call__

    def counted(siblings, *args):
        made = call(siblings, *args)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(Siblings, "__call__", counted)
    return sizes


def test_query_key_and_value_are_one_node(nodes):
    model, batch = classifier("bara")
    step(model, batch, fuse=True)
    assert nodes == [3, 1, 1, 1] * 2 + [1]  # and the pooler
    nodes.clear()
    model, batch = language_model("balora")
    step(model, batch, fuse=True)
    assert nodes == [3, 1, 2, 1] * 2


def test_with_dropout_of_its_own_every_layer_reads_for_itself(nodes):
    model, batch = classifier("bara", lora_dropout=0.1)
    step(model, batch, fuse=True)
    assert nodes == [1] * 13


class CrossAttention(nn.Module):
    """Its key and value read what the query does not, and its query is called twice."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 5).double() for _ in range(3))

    def forward(self, x, other):
        y = self.query(x) * self.key(other) + self.value(other) + self.query(x)
        return {"logits": y, "loss": y.square().mean()}


def test_layers_that_read_something_else_compute_it_for_themselves(nodes):
    torch.manual_seed(0)
    model = adapt(CrossAttention(), "bara", target_modules=["query", "key", "value"])
    stir(model.double()).train()
    batch = {
        name: torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        for name in ("x", "other")
    }
    draws = Draws(2, seed=5)
    fused = step(model, batch, fuse=True, draws=draws)
    assert nodes[:2] == [3, 1]
    of_inputs = [batch[name].grad.clone() for name in batch]
    for tensor in batch.values():
        tensor.grad = None
    assert_alike(fused, step(model, batch, fuse=False, draws=draws), 1e-6)
    for found, tensor in zip(of_inputs, batch.values(), strict=True):
        torch.testing.assert_close(found, tensor.grad)


# -- layers that are not what the fused step takes them for ------------------------------------


def refusals():
    def dropout(model):
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = nn.Dropout(0.5)

    def bias(model):
        for module in model.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].bias = nn.Parameter(
                    torch.ones(module.out_features).double()
                )

    def offload(model):
        for module in model.modules():
            if hasattr(module, "lora_A"):
                add_hook_to_module(module.lora_A["default"], ModelHook())

    def hook(model):
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.lora_A["default"].register_forward_hook(lambda m, x, y: 2 * y)

    class Halved(BaraPosterior):
        def forward(self, space, noise, with_kl):
            output = super().forward(space, noise, with_kl)
            return output._replace(u=output.u / 2)

    def subclass(model):
        for module in model.modules():
            if isinstance(module, BaraPosterior):
                module.__class__ = Halved

    return {
        "dropout": dropout,
        "bias": bias,
        "offload": offload,
        "hook": hook,
        "subclass": subclass,
    }


@pytest.mark.parametrize("name", refusals())
def test_changed_layers_go_on_their_own(name, steps):
    model, batch = classifier("bara")
    refusals()[name](model.double())
    draws = Draws(2, seed=5)
    torch.manual_seed(0)
    one = step(model, batch, fuse=True, draws=draws)
    assert len(steps) == (13 if name == "dropout" else 0)
    torch.manual_seed(0)
    assert_alike(one, step(model, batch, fuse=False, draws=draws), 1e-4)


def test_two_adapters_at_once_go_on_their_own(steps):
    model, batch = language_model("bara")
    model.add_adapter("other", bara.BaraConfig(r=2, target_modules=["q_proj"], num_observations=50))
    model.base_model.set_adapter(["default", "other"])
    stir(model)
    draws = Draws(2, seed=5)
    one = step(model, batch, fuse=True, draws=draws)
    assert steps == []
    assert_alike(one, step(model, batch, fuse=False, draws=draws), 1e-4)


def test_convolutions_and_merged_or_disabled_adapters_take_no_fused_step(steps):
    model = adapt(TinyConv(), "bara", target_modules=["conv"])
    batch = {"pixel_values": torch.randn(2, 3, 5, 5), "labels": torch.tensor([0, 1])}
    model.train()(**batch)["loss"].backward()
    assert steps == []
    model, batch = classifier("scalabl")
    with model.disable_adapter():
        model(**batch)
    model.merge_adapter()
    model.eval()(**batch)
    assert steps == []


def test_plain_lora_beside_keeps_the_cast_that_it_needs(steps):
    torch.manual_seed(0)
    model = tiny_llama().to(torch.bfloat16)
    model = adapt(model, "bara", target_modules=["q_proj"])
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.cast_input_dtype_enabled
    plain = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    assert plain.base_model.model.model.layers[0].self_attn.q_proj.cast_input_dtype_enabled


def test_a_second_derivative_is_refused():
    model, batch = classifier("bara")
    loss = model(**batch).loss
    weight = next(p for n, p in model.named_parameters() if "lora_A" in n)
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        gradient.sum().backward()


def test_predictions_with_draws_are_those_without(steps):
    for method in FIXED:
        model, batch = classifier(method)
        del batch["labels"]
        fused = bara.predict(model, batch, num_draws=3, seed=1).probs
        assert steps
        elbo_of(model).fuse = False
        torch.testing.assert_close(bara.predict(model, batch, num_draws=3, seed=1).probs, fused)
