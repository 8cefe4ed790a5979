"""The certified mode: what is drawn, what is paid for, and the command end to end."""

import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence
from transformers import BertForSequenceClassification

import bara
import bara.certificates.certificate
from bara import BaraConfig, BaraError, CertifiedConfig
from bara.certificates.bounds import mean_bound, pac_bayes_kl_bound
from bara.certificates.certificate import NUM_PRIORS
from bara.cli import main
from bara.draws.draws import Draws, FixedNoise
from bara.finetuning.certified_prior import start_from_prior
from bara.finetuning.finetune import finetune
from bara.methods.recipe import TrainRecipe
from conftest import tiny_bert_config, write_jsonl
from helpers import TinyConv, TinyNet, stir

IDS = torch.randint(5, 20, (6, 7), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_bert_config(num_labels=3))


def certified(base=None, **options):
    torch.manual_seed(0)
    options = {
        "r": 4,
        "target_modules": ["query", "value"],
        "task_type": "SEQ_CLS",
        "num_observations": 50,
        "warmup": 0.0,
    } | options
    return get_peft_model(base or bert(), CertifiedConfig(**options))


def tiny_layer(seed=0):
    """A stirred certified adapter on one linear layer, without a head."""
    torch.manual_seed(seed)
    config = CertifiedConfig(
        r=3, lora_alpha=6, target_modules=["layer"], num_observations=9, warmup=0.0
    )
    model = stir(get_peft_model(TinyNet(), config), scale=0.1).eval()
    layer = model.base_model.model.layer
    return model, layer, layer.lora_posterior["default"]


@torch.no_grad()
def logits(model, seed=None, num_draws=1):
    model.eval()
    if seed is None:
        return model(**INPUTS).logits
    rows = {name: value.repeat(num_draws, 1) for name, value in INPUTS.items()}
    with bara.sampling(model, num_draws=num_draws, seed=seed):
        return model(**rows).logits


# -- the model -----------------------------------------------------------------------------------


def test_eval_mode_starts_as_the_unchanged_model_and_pays_nothing():
    base = bert().eval()
    model = certified()
    with torch.no_grad():
        expected = base(**INPUTS).logits
    torch.testing.assert_close(logits(model), expected)
    assert not torch.allclose(logits(model, seed=0), expected)
    assert float(bara.certificates.certificate.kl_divergence(model)) == pytest.approx(0, abs=1e-4)


def test_a_is_frozen_and_everything_that_moves_is_paid_for():
    model = certified(modules_to_save=["pooler"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(**INPUTS, labels=LABELS).loss.backward()
    optimizer.step()
    moved = [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])]
    assert moved
    for name in moved:
        head = ".lora_head.default." in name and (".mean_" in name or ".spread_" in name)
        layer = name.endswith(
            (".lora_B.default.weight", ".default.gate", ".lora_posterior.default.spread")
        )
        assert head or layer, name
    for part in ("lora_B.", "posterior.default.gate", "classifier.lora", "pooler.dense.lora"):
        assert any(part in name for name in moved), part


def test_a_draw_of_a_layer_is_that_of_explicitly_drawn_weights():
    model, layer, posterior = tiny_layer()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    noise = Draws(2, seed=7)
    z = noise.numbers("layer/z", "uniform", (3,), torch.device("cpu"))
    eps = noise.numbers("layer/B", "normal", (5, 3), torch.device("cpu"))
    with torch.no_grad(), bara.sampling(model, num_draws=2, seed=7):
        drawn = model(x=x.repeat(2, 1))["logits"].view(2, 5, 5)
    with torch.no_grad():
        a, mu = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        std = torch.exp(math.log(0.1) + 10 * posterior.spread)
        p = torch.sigmoid(math.log(9) + 10 * posterior.gate)
        for draw in range(2):
            gates = (z[draw] > 1 - p).float()
            weight = layer.base_layer.weight + 2 * (mu + std * eps[draw]) @ torch.diag(gates) @ a
            expected = x @ weight.T + layer.base_layer.bias
            torch.testing.assert_close(drawn[draw], expected, atol=1e-5, rtol=1e-5)


def test_gates_are_drawn_with_their_probability():
    _, _, posterior = tiny_layer()
    draws = 4000
    with torch.no_grad():
        p = posterior.logit().sigmoid()
        noise = Draws(draws, seed=0)
        z = posterior._draw_gates(FixedNoise(noise, torch.arange(draws), "layer"))
    assert set(z.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(z.mean(0), p, atol=0.03, rtol=0)


def test_kl_of_a_layer_against_monte_carlo_over_gates_and_weights():
    _, layer, posterior = tiny_layer()
    with torch.no_grad():
        mu = layer.lora_B["default"].weight
        posterior.spread *= 0.1
        std = torch.exp(math.log(0.1) + 10 * posterior.spread).expand(5, 3)
        p, pi = torch.sigmoid(math.log(9) + 10 * posterior.gate), 0.9
        torch.manual_seed(0)
        z = torch.bernoulli(p.expand(40_000, 3))
        # a closed factor's column comes from the prior
        q = Normal(torch.zeros(3), 0.1), Normal(mu, std)
        b = torch.where(z.unsqueeze(1) > 0, q[1].sample((40_000,)), 0.1 * torch.randn(40_000, 5, 3))
        prior = q[0].log_prob(b)
        ratio = torch.where(z.unsqueeze(1) > 0, q[1].log_prob(b) - prior, 0).sum((1, 2))
        ratio += (Bernoulli(p).log_prob(z) - Bernoulli(torch.tensor(pi)).log_prob(z)).sum(1)
        error = float(ratio.std()) / 200
        assert float(posterior.kl_of(mu)) == pytest.approx(float(ratio.mean()), abs=4 * error)
        assert float(posterior.kl_of(mu)) > 10 * error


def test_a_draw_of_the_head_is_one_matrix_for_every_row():
    model = stir(certified(), scale=0.05)
    head = model.base_model.model.classifier
    x = torch.randn(4, 32)
    with torch.no_grad(), bara.sampling(model, num_draws=1, seed=5) as draws:
        hidden = {}
        handle = head.register_forward_pre_hook(lambda _, args: hidden.update(x=args[0]))
        sampled = model(**INPUTS).logits
        handle.remove()
        posterior = head.lora_head["default"]
        numbers = {
            name: draws.numbers(f"classifier/{name}", "normal", shape, x.device)[0]
            for name, shape in (("weight", (3, 32)), ("bias", (3,)))
        }
        weight, bias = (
            getattr(posterior, f"mean_{name}")
            + 0.1 * torch.exp(10 * getattr(posterior, f"spread_{name}")) * numbers[name]
            for name in ("weight", "bias")
        )
        torch.testing.assert_close(sampled, hidden["x"] @ weight.T + bias, atol=1e-5, rtol=1e-5)


def test_the_kl_is_the_sum_of_all_terms_in_the_saved_file(tmp_path):
    model = stir(certified(modules_to_save=["pooler"]), scale=0.03)
    model.train()
    model(**INPUTS, labels=LABELS)
    in_loss = bara.kl_terms(model)["kl_global"]
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    total, used = 0.0, set()

    def take(name):
        used.add(name)
        return tensors[name].double()

    for name in tensors:
        stem = name.removesuffix(".lora_B.weight")
        if stem != name:
            p = torch.sigmoid(math.log(9) + 10 * take(f"{stem}.lora_posterior.gate"))
            std = 0.1 * torch.exp(10 * take(f"{stem}.lora_posterior.spread"))
            mu = take(name)
            columns = kl_divergence(Normal(mu, std), Normal(torch.zeros_like(mu), 0.1)).sum(0)
            gates = kl_divergence(Bernoulli(p), Bernoulli(torch.full_like(p, 0.9)))
            total += float((gates + p * columns).sum())
        if ".lora_head.mean_" in name:
            std = 0.1 * torch.exp(10 * take(name.replace(".mean_", ".spread_")))
            prior = Normal(take(name.replace(".mean_", ".prior_mean_")), 0.1)
            total += float(kl_divergence(Normal(take(name), std), prior).sum())
    fixed = ("lora_A.weight", "prior_mean", "prior_logit", "prior_log_std")
    unpaid = [
        n for n in tensors.keys() - used if not n.endswith(fixed) and "prior_log_std" not in n
    ]
    assert unpaid == []
    assert float(bara.certificates.certificate.kl_divergence(model)) == pytest.approx(
        total, rel=1e-4
    )
    assert in_loss == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(tmp_path, low_cpu_mem_usage):
    model = stir(certified(modules_to_save=["pooler"]), scale=0.05)
    model.save_pretrained(tmp_path)
    other = bert()
    nn.init.normal_(other.classifier.weight)  # a new head is random: it comes with the adapter
    loaded = PeftModel.from_pretrained(
        other, tmp_path, adapter_name="renamed", low_cpu_mem_usage=low_cpu_mem_usage
    )
    torch.testing.assert_close(logits(loaded), logits(model))
    torch.testing.assert_close(logits(loaded, seed=1), logits(model, seed=1))
    kl = float(bara.certificates.certificate.kl_divergence(model))
    assert float(bara.certificates.certificate.kl_divergence(loaded)) == pytest.approx(kl, rel=1e-6)


def test_without_the_adapter_the_model_is_the_base_even_when_sampling():
    model = stir(certified(target_modules="all-linear"), scale=0.05)
    base = bert().eval()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(logits(model, seed=1), base(**INPUTS).logits)


def test_a_disabled_adapter_is_not_certified():
    model = stir(certified(), scale=0.05)
    with model.disable_adapter(), pytest.raises(BaraError, match="needs the adapter in force"):
        bara.certify(model, labelled())


def test_the_prior_of_a_part_is_its_posterior(tmp_path):
    first = stir(certified(), scale=0.05)
    first.save_pretrained(tmp_path)
    second = certified()
    start_from_prior(second, tmp_path)
    assert float(bara.certificates.certificate.kl_divergence(second)) == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(logits(second, seed=3), logits(first, seed=3))
    stir(second, scale=0.01)
    assert float(bara.certificates.certificate.kl_divergence(second)) > 1


def test_what_is_refused():
    for options in (
        {"prior_std": 0.2},
        {"head_prior_std": 5},
        {"global_prior": 1.0},
        {"prior_fraction": 1.0},
        {"bias": "lora_only"},
        {"trainable_token_indices": [1]},
    ):
        with pytest.raises(BaraError, match=next(iter(options))):
            CertifiedConfig(**options)
    with pytest.raises(BaraError, match="linear layers only"):
        get_peft_model(TinyConv(), CertifiedConfig(target_modules=["conv"]))
    with pytest.raises(BaraError, match=r"cannot train .*LayerNorm"):
        certified(modules_to_save=["output"])
    model = certified()
    with pytest.raises(BaraError, match="certified adapter already"):
        model.add_adapter("second", CertifiedConfig(target_modules=["key"]))
    with pytest.raises(BaraError, match="not merged"):
        certified().merge_and_unload()


# -- the certificate -----------------------------------------------------------------------------


def labelled(repeats=20):
    batch = {name: value.repeat(repeats, 1) for name, value in INPUTS.items()}
    return {**batch, "labels": LABELS.repeat(repeats)}


def test_certificate_is_the_bound_of_its_parts():
    model = stir(certified(r=2), scale=0.02)
    result = bara.certify(model, labelled(), delta=0.1, num_draws=10, seed=1, batch_size=64)
    assert result.n == 120
    assert result.num_samples == 1200
    assert result.majority_error == pytest.approx(2 / 3)
    assert result.kl == float(bara.certificates.certificate.kl_divergence(model))
    assert result.gibbs_risk_bound == mean_bound(result.gibbs_risk, 1200, 0.01)
    expected = pac_bayes_kl_bound(result.gibbs_risk_bound, result.kl, 120, 0.09, NUM_PRIORS)
    assert result.bound == expected
    assert result.complexity_effective < result.complexity_max
    assert result.effective_rank < result.max_rank == 2
    # the Gibbs risk by another road: whole models, drawn one by one
    wrong = logits(model, seed=99, num_draws=400).view(400, 6, 3).argmax(-1) != LABELS
    assert result.gibbs_risk == pytest.approx(float(wrong.float().mean()), abs=0.04)


class TinyClassifier(TinyNet):
    """A layer to adapt and a head, on six numbers."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(5, 2)

    def forward(self, x, labels=None):
        logits = self.classifier(self.layer(x).tanh())
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def test_training_gives_a_bound_that_says_something_and_holds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1400, 6, generator=generator)
    batch = {"x": x, "labels": (x[:, 0] + x[:, 1] > 0).long()}
    seen, unseen = (
        {k: v[part] for k, v in batch.items()} for part in (slice(400), slice(400, None))
    )
    torch.manual_seed(1)
    options = {"head_prior_std": 1.0, "prior_std": 0.3, "r": 2, "lora_alpha": 4}
    config = CertifiedConfig(target_modules=["layer"], num_observations=400, warmup=0.0, **options)
    model = get_peft_model(TinyClassifier(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(300):
        model(**seen)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    certificate = bara.certify(model, seen, num_draws=5)
    elsewhere = bara.certify(model, unseen, num_draws=2)  # its risk is an estimate of the true one
    assert certificate.gibbs_risk < 0.2
    assert elsewhere.gibbs_risk < certificate.bound < 0.45 < certificate.majority_error
    assert "better than" in certificate.verdict


def test_every_prediction_has_a_draw_of_its_own(monkeypatch):
    used = []
    original = Draws.__init__

    def spy(self, num_draws=1, seed=None, first=0):
        used.extend(range(first, first + num_draws))
        original(self, num_draws, seed, first)

    monkeypatch.setattr(Draws, "__init__", spy)
    bara.certify(certified(), labelled(2), num_draws=5, batch_size=16)
    assert sorted(used) == list(range(12 * 5))


@pytest.mark.parametrize(
    "options",
    [
        {"num_labels": 1, "problem_type": "regression"},
        {"num_labels": 2, "problem_type": "regression"},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ],
)
def test_what_has_no_error_rate_is_not_certified(options):
    """The largest output of a regression is always its first, "class" 0."""
    several = options["problem_type"] != "regression"
    labels = torch.zeros(12, *([3] if several else []), dtype=torch.float)
    data = {name: part.repeat(2, 1) for name, part in INPUTS.items()} | {"labels": labels}
    torch.manual_seed(0)
    model = certified(BertForSequenceClassification(tiny_bert_config(**options)))
    with pytest.raises(BaraError, match="one class for each input"):
        bara.certify(model.eval(), data, num_draws=2)


@pytest.mark.parametrize("label", [3, -100])
def test_a_label_that_is_no_class_is_not_certified_on(label):
    data = {name: part.repeat(2, 1) for name, part in INPUTS.items()}
    data["labels"] = torch.cat([LABELS, LABELS[:5], torch.tensor([label])])
    with pytest.raises(BaraError, match=f"label {label} is not a class"):
        bara.certify(certified().eval(), data, num_draws=2)


def test_a_vacuous_bound_is_called_vacuous():
    model = stir(certified(), scale=0.3)
    result = bara.certify(model, labelled(2), num_draws=2)
    assert result.bound == pytest.approx(1)
    assert "vacuous" in result.verdict


def test_other_adapters_cannot_be_certified():
    model = get_peft_model(bert(), BaraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(BaraError, match="point estimates"):
        bara.certify(model, labelled())
    for options in ({"delta": 0.0}, {"num_draws": 0}):
        with pytest.raises(BaraError, match=next(iter(options))):
            bara.certify(certified(), labelled(), **options)


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    rows = [
        {"text": f"the {noun} is {word}", "label": label}
        for label, words in (("pos", ("good", "great", "fine")), ("neg", ("bad", "awful", "poor")))
        for word in words
        for noun in ("film", "plot", "food", "a film", "a plot", "warm food")
    ]
    return write_jsonl(tmp_path / "table.jsonl", rows)


def train(model, table, output, *more):
    return main(
        [
            *("train", "--method", "certified", "--model", str(model), "--data", str(table)),
            *("--output", str(output), "--epochs", "2", "-r", "2", *map(str, more)),
        ]
    )


def test_train_and_certify(tmp_path, tiny_model_dir, table, capsys):
    adapter, output = tmp_path / "adapter", tmp_path / "certificate.json"
    assert train(tiny_model_dir, table, adapter, "--prior-fraction", 0.5) == 0
    command = ["certify", str(adapter), "--data", str(table), "--num-draws", "5"]
    assert main([*command, "--output", str(output)]) == 0, capsys.readouterr().err
    assert "bound on the error rate" in capsys.readouterr().out
    certificate = json.loads(output.read_text())
    assert certificate["n"] == 18
    assert certificate["gibbs_risk"] < certificate["bound"] <= 1
    assert "assumptions" in certificate
    assert main([*command, "--output", str(output)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--output", str(output), "--force"]) == 0
    capsys.readouterr()

    rows = table.read_text().splitlines()
    table.write_text("\n".join(rows[::-1]) + "\n")
    assert main(command) == 1
    assert capsys.readouterr().err.startswith("bara: error: these are not the data")
    table.write_text("\n".join(rows[:-1]) + "\n")
    assert main(command) == 1


def test_only_certified_classifiers(tmp_path, tiny_model_dir, table, capsys):
    other = tmp_path / "other"
    options = ["--model", str(tiny_model_dir), "--data", str(table), "--epochs", "1"]
    assert main(["train", *options, "--output", str(other)]) == 0
    assert main(["certify", str(other), "--data", str(table)]) == 1
    assert "point estimates" in capsys.readouterr().err
    assert main(["train", *options, "--output", str(other), "--prior-fraction", "0.5"]) == 1
    assert "--prior-fraction" in capsys.readouterr().err
    lone = [json.loads(row) for row in table.read_text().splitlines()]
    lone.append({"text": "the food", "label": "odd"})
    sole = write_jsonl(tmp_path / "lone.jsonl", lone)
    assert train(tiny_model_dir, sole, tmp_path / "x", "--prior-fraction", 0.1) == 1
    error = capsys.readouterr().err
    assert "for the prior have none of the class" in error
    assert "(--prior-fraction)" in error
    scores = [{"text": f"film {i}", "label": i + 0.5} for i in range(9)]
    scored = write_jsonl(tmp_path / "scores.jsonl", scores)
    assert train(tiny_model_dir, scored, tmp_path / "y") == 1
    assert "only classifiers" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_rows_to_certify_on(tmp_path, tiny_model_dir, table, capsys):
    """The checkpoint's prior has learned rows that another split would certify on."""
    adapter = tmp_path / "adapter"
    assert train(tiny_model_dir, table, adapter, "--prior-fraction", 0.5) == 0
    lines = table.read_text().splitlines(keepends=True)
    reordered = tmp_path / "reordered.jsonl"
    reordered.write_text("".join(lines[::-1]))
    resume = ["train", "--resume", "--output", str(adapter), "--epochs", "3"]
    capsys.readouterr()
    for other in (["--seed", "1"], ["--data", str(reordered)]):
        assert main([*resume, *other]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "resume it with the seed and the table" in error
    assert main(resume) == 0  # what was refused changed nothing
    assert main(["certify", str(adapter), "--data", str(table), "--num-draws", "2"]) == 0


def test_a_resumed_run_keeps_its_prior(tmp_path, tiny_model_dir, table):
    def recipe(name):
        return TrainRecipe(
            model=str(tiny_model_dir),
            data=str(table),
            output=str(tmp_path / name),
            method="certified",
            method_options={"r": 2, "prior_fraction": 0.5, "kl_weight": 10.0},
            training={"num_train_epochs": 2, "learning_rate": 0.01, "save_total_limit": None},
        )

    finetune(recipe("whole"))
    finetune(recipe("resumed"))
    checkpoints = sorted((tmp_path / "resumed/checkpoints").glob("checkpoint-*"))
    (checkpoints[-1] / "complete").unlink()
    finetune(recipe("resumed"), resume=True)
    whole, resumed = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed")
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, msg=lambda text, n=name: f"{n}: {text}")
    # a heavier KL to the prior is no reason to learn a worse prior
    weights = [
        json.loads((tmp_path / "whole" / part / "adapter_config.json").read_text())["kl_weight"]
        for part in ("", "prior")
    ]
    assert weights == [10.0, 1.0]
    prior = load_file(tmp_path / "whole/prior/adapter_model.safetensors")
    b = next(name for name in prior if name.endswith("lora_B.weight"))
    mean = b.replace("lora_B.weight", "lora_posterior.prior_mean")
    torch.testing.assert_close(whole[mean], prior[b])
    assert not torch.equal(whole[b], prior[b])
