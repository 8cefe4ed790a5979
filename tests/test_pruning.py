"""Pruning: what stays is what was, what goes is what the task does not use."""

import copy
import math

import pytest
import torch
from peft import PeftModel
from torch import nn

import bara
from bara import BaraError
from bara.adapter.inspection import rank_fields
from bara.adapter.layer import adapted_layers
from bara.posteriors.distributions import open_logit
from encoder_decoders import tiny_seq2seq
from helpers import TinyConv, TinyNet, adapt, layer_posterior, stir
from language_models import adapted_lm

CLOSED, OPEN = -1.0, 0.2
"""Parameters of a global gate with P(z > 0) below 1e-8, and of 0.99."""


def close(model, factors, layers=None):
    """Closes these factors' global gates (in every layer, or the layers of these numbers)."""
    for number, (_, _, posterior) in enumerate(adapted_layers(model, "default")):
        posterior.global_logit.data[:] = OPEN
        if layers is None or number in layers:
            posterior.global_logit.data[list(factors)] = CLOSED
    return model


def constant_gates(model):
    """Local gates that do not read their input, so that nothing has to be fitted."""
    for _, _, posterior in adapted_layers(model, "default"):
        posterior.gate_weight.data.zero_()
    return model


def outputs(model, data):
    with torch.no_grad():
        return model(**data)["logits"]


@pytest.fixture
def bert(tiny_bert):
    options = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    return stir(adapt(copy.deepcopy(tiny_bert), **options), 0.1).eval()


@pytest.fixture
def batch():
    torch.manual_seed(0)
    mask = torch.ones(12, 6, dtype=torch.long)
    mask[::2, 4:] = 0
    return {"input_ids": torch.randint(5, 20, (12, 6)), "attention_mask": mask}


@pytest.mark.parametrize("rslora", [False, True])
def test_unused_factors_go_and_the_outputs_stay(tiny_bert, bert, batch, tmp_path, rslora):
    options = {"alpha_pattern": {"layer.1.attention.self.value": 3}, "use_rslora": rslora}
    model = adapt(copy.deepcopy(tiny_bert), task_type="SEQ_CLS", **options)
    model = constant_gates(close(stir(model, 0.1).eval(), [0, 2], layers=[0, 3]))
    before = outputs(model, batch)
    pruning = bara.prune(model, batch, held_out=batch)
    torch.testing.assert_close(outputs(pruning.model, batch), before, atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs(model, batch), before, atol=0, rtol=0)
    assert pruning.removed == 4
    assert [len(kept) for kept in pruning.kept.values()] == [2, 4, 4, 2]
    # A and B of a factor, its gates' parameters, and the rows and columns of V
    weights = 2 * 2 * (32 + 32) + 2 * 2 * 3 + 2 * (4 * 4 - 2 * 2)
    assert pruning.parameters[0] - pruning.parameters[1] == weights
    assert pruning.bytes[0] - pruning.bytes[1] == 4 * weights
    assert pruning.change.mean.largest < 1e-6
    assert len(str(pruning).splitlines()) == 7

    pruning.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_bert), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, batch), before, atol=1e-6, rtol=0)
    scalings = [
        {name: layer.scaling["default"] for name, layer, _ in adapted_layers(m, "default")}
        for m in (model, loaded)
    ]
    assert scalings[0] == pytest.approx(scalings[1])
    assert {layer.r["default"] for _, layer, _ in adapted_layers(loaded, "default")} == {2, 4}


def test_draws_keep_their_distribution():
    torch.manual_seed(0)
    model = stir(adapt(TinyNet(), target_modules=["layer"]), 0.1).eval()
    close(model, [1], layers=[0])
    posterior = layer_posterior(model)[1]
    posterior.gate_weight.data.zero_()
    x = torch.randn(2, 6)
    pruned = bara.prune(model, {"x": x}).model
    draws = []
    for seed, m in enumerate((model, pruned)):
        with torch.no_grad(), bara.sampling(m, num_draws=4000, seed=seed):
            draws.append(m(x=x.repeat(4000, 1))["logits"].view(4000, 2, 5))
    first, second = draws
    error = ((first.var(0) + second.var(0)) / 4000).sqrt()
    assert ((first.mean(0) - second.mean(0)).abs() < 4.5 * error).all()
    torch.testing.assert_close(first.std(0), second.std(0), rtol=0.12, atol=0)


def test_gates_are_fitted_by_least_squares_to_their_old_logits(batch):
    torch.manual_seed(0)
    options = {"target_modules": ["layer"]}
    model = close(stir(adapt(TinyNet(), **options), 0.2).eval(), [1, 3])
    layer, posterior = layer_posterior(model)
    x = torch.randn(50, 6)
    u = (x @ layer.lora_A["default"].weight.T).double().detach()
    h = u / u.square().mean(1, keepdim=True).sqrt()
    old = h @ posterior.gate_weight.double().T / math.sqrt(4) + posterior.gate_bias
    pruned = layer_posterior(bara.prune(model, {"x": x}).model)[1]
    left = u[:, [0, 2]] / u[:, [0, 2]].square().mean(1, keepdim=True).sqrt()
    design = torch.cat([left, torch.ones(50, 1)], dim=1)
    best = torch.linalg.lstsq(design, old[:, [0, 2]].detach()).solution
    weight = pruned.gate_weight.double() / math.sqrt(2)
    torch.testing.assert_close(weight, best[:2].T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pruned.gate_bias.double(), best[2], atol=1e-5, rtol=1e-4)


def test_padding_does_not_enter_the_fit(bert, batch):
    close(bert, [0])
    noisy = {**batch, "input_ids": batch["input_ids"].clone()}
    noisy["input_ids"][batch["attention_mask"] == 0] = 7
    first, second = (bara.prune(bert, data).model for data in (batch, noisy))
    torch.testing.assert_close(outputs(first, batch), outputs(second, batch), atol=1e-6, rtol=0)


def test_a_layer_without_factors_loses_its_adapter(tiny_bert, bert, batch, tmp_path):
    constant_gates(close(bert, range(4), layers=[1]))
    pruning = bara.prune(bert)  # nothing to fit
    torch.testing.assert_close(
        outputs(pruning.model, batch), outputs(bert, batch), atol=1e-6, rtol=0
    )
    assert sum(1 for _ in adapted_layers(pruning.model, "default")) == 3
    pruning.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert, tmp_path).eval()
    assert sum(1 for _ in adapted_layers(loaded, "default")) == 3
    torch.testing.assert_close(outputs(loaded, batch), outputs(pruning.model, batch))


@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"lora_bias": True}])
def test_a_layer_with_a_trained_bias_is_not_emptied(tiny_bert, options):
    """PEFT saves such a bias with the layer's adapter, or in it."""
    model = adapt(
        tiny_bert, task_type="SEQ_CLS", local_gate=False, target_modules=["query", "key"], **options
    )
    close(model, range(4), layers=[1])
    with pytest.raises(BaraError, match=r"would remove all factors of .* the bias that"):
        bara.prune(model)


def test_inclusion_is_the_probability_of_an_open_gate(bert, batch):
    pruning = bara.prune(bert, batch, threshold=0.0)
    assert pruning.removed == 0
    for name, _, posterior in adapted_layers(bert, "default"):
        expected = torch.sigmoid(open_logit(100 * posterior.global_logit))
        torch.testing.assert_close(pruning.inclusion[name], expected.detach())


def test_the_pruned_model_shares_the_base_and_trains_alone(bert, batch):
    close(bert, [0])
    pruned = bara.prune(bert, batch).model
    ours, theirs = bert.get_base_model().bert, pruned.get_base_model().bert
    assert ours.embeddings.word_embeddings.weight is theirs.embeddings.word_embeddings.weight
    before = outputs(bert, batch)
    optimiser = torch.optim.SGD([p for p in pruned.parameters() if p.requires_grad], lr=0.1)
    pruned.train()
    pruned(**batch, labels=torch.zeros(12, dtype=torch.long)).loss.backward()
    optimiser.step()
    assert not torch.equal(outputs(pruned.eval(), batch), before)
    torch.testing.assert_close(outputs(bert, batch), before, atol=0, rtol=0)


def test_convolutions():
    torch.manual_seed(0)
    model = stir(adapt(TinyConv(), target_modules=["conv"]), 0.1).eval()
    constant_gates(close(model, [1, 2]))
    images = {"pixel_values": torch.randn(4, 3, 6, 6)}
    pruned = bara.prune(model, images).model
    torch.testing.assert_close(outputs(pruned, images), outputs(model, images), atol=1e-6, rtol=0)
    assert layer_posterior(pruned)[0].lora_A["default"].weight.shape[0] == 2


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_fields_keep_every_scaling(rslora):
    layers = {"a.b": (4, 2.0), "a.c": (2, 2.0), "d.b": (4, 0.3)}
    fields = rank_fields(layers, rslora)
    assert fields["r"] == 4
    assert fields["rank_pattern"] == {"^a.c": 2}
    for name, (rank, scaling) in layers.items():
        alpha = fields["alpha_pattern"].get(f"^{name}", fields["lora_alpha"])
        assert alpha / (math.sqrt(rank) if rslora else rank) == pytest.approx(scaling)
    if not rslora:
        assert isinstance(fields["lora_alpha"], int)


def test_refusals(bert, batch, tiny_bert):
    with pytest.raises(BaraError, match="would remove every factor"):
        bara.prune(bert, batch, threshold=1.0)
    for wrong in (-0.1, 1.5, math.nan):
        with pytest.raises(BaraError, match=r"threshold must be in \[0, 1\]"):
            bara.prune(bert, batch, threshold=wrong)
    close(bert, [0])
    with pytest.raises(BaraError, match="prune needs data"):
        bara.prune(bert)
    with pytest.raises(BaraError, match="The data set is empty"):
        bara.prune(bert, [])
    with pytest.raises(BaraError, match="tolerance"):
        bara.prune(bert, batch, tolerance=0.1)
    posterior = layer_posterior(bert)[1]
    posterior.global_logit.data[:3] = 0.0  # as likely in use as not
    with pytest.raises(BaraError, match="more than the tolerance of 0"):
        bara.prune(bert, batch, threshold=0.9, held_out=batch, tolerance=0.0)
    with pytest.raises(BaraError, match="PEFT model"):
        bara.prune(nn.Linear(2, 2), batch)
    other = adapt(copy.deepcopy(tiny_bert), "balora", task_type="SEQ_CLS")
    with pytest.raises(BaraError, match=r"needs a BaRA adapter with global gates; .* BALORA"):
        bara.prune(other, batch)
    ungated = adapt(copy.deepcopy(tiny_bert), global_gate=False, task_type="SEQ_CLS")
    with pytest.raises(BaraError, match="BARA without them"):
        bara.prune(ungated, batch)


# -- language models -------------------------------------------------------------------------------


@pytest.fixture
def texts():
    ids = torch.randint(3, 64, (5, 7), generator=torch.Generator().manual_seed(0))
    rows = []
    for number, row in enumerate(ids):
        text = row[: 7 - number % 3]
        labels = text.clone()
        labels[: 1 + number % 2] = -100
        rows.append({"input_ids": text, "attention_mask": torch.ones_like(text), "labels": labels})
    return rows


def next_token_probs(model, row):
    """Probabilities where the text has labels, (labels, V), of a text by itself."""
    shift = model.config.is_encoder_decoder
    inputs = {name: values.unsqueeze(0) for name, values in row.items()}
    with torch.no_grad():
        probs = model.eval()(**inputs).logits.softmax(-1)[0]
    return probs[row["labels"] != -100] if shift else probs[:-1][row["labels"][1:] != -100]


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_language_models_change_by_what_they_expect_next(architecture, texts):
    if architecture == "t5":
        options = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
        model = stir(adapt(tiny_seq2seq("t5"), **options)).eval()
    else:
        model = adapted_lm()
    close(model, [0, 3])
    pruning = bara.prune(model, texts, held_out=texts, num_draws=3, batch_size=6)
    variation, others = [], []
    for row in texts:
        before, after = (next_token_probs(m, row) for m in (model, pruning.model))
        variation.append(0.5 * (before - after).abs().sum(-1).mean().item())
        others.append(bool((before.argmax(-1) != after.argmax(-1)).any()))
    mean = pruning.change.mean
    assert mean.num_inputs == len(texts)
    assert mean.mean == pytest.approx(sum(variation) / len(texts), rel=1e-3)
    assert mean.largest == pytest.approx(max(variation), rel=1e-3)
    assert mean.changed == sum(others) / len(texts)
    assert 0 < mean.mean < 1

    mixtures = []
    for which, seed in ((model, 5), (pruning.model, 6), (model, 6)):
        with bara.sampling(which, 3, seed=seed):
            rows = [{k: v.repeat(3, 1) for k, v in row.items()} for row in texts]
            mixtures.append([_mixture(which, row) for row in rows])
    change = bara.prune(model, texts, held_out=texts, num_draws=3, seed=5).change
    for found, other in ((change.draws, mixtures[1]), (change.draws_before, mixtures[2])):
        apart = [
            0.5 * (a - b).abs().sum(-1).mean().item()
            for a, b in zip(mixtures[0], other, strict=True)
        ]
        assert found.mean == pytest.approx(sum(apart) / len(texts), rel=1e-3)


def _mixture(model, rows):
    """The mean of the draws' probabilities where a text has labels, of a text once for each."""
    labels = rows["labels"][0] != -100
    with torch.no_grad():
        probs = model(**rows).logits.softmax(-1).mean(0)
    return probs[labels] if model.config.is_encoder_decoder else probs[:-1][labels[1:]]


def test_a_language_model_without_labels_is_not_measured(texts):
    model = close(adapted_lm(), [0])
    bare = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in texts]
    with pytest.raises(BaraError, match="measured where its inputs have labels"):
        bara.prune(model, bare, held_out=bare)
    empty = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in texts]
    with pytest.raises(BaraError, match="none of the texts has a label"):
        bara.prune(model, bare, held_out=empty)
    assert bara.prune(model, bare).change is None
