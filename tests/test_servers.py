"""Exports read by the rules of inference servers, and served by one that follows them."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

import bara
from bara import BaraError
from bara.draws.draws import attach_draws
from bara.export.client import Ensemble, EnsembleError, main
from bara.methods import Factors, WeightDraws, set_temperature
from conftest import write_jsonl
from helpers import TinyConv, adapt, stir, tiny_llama
from language_models import tiny_lm, word_tokenizer, words
from lora_servers import LoraServer, older_vllm, sglang, vllm

UNEVEN = {
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"0.self_attn.v_proj": 2},
    "alpha_pattern": {"1.self_attn.q_proj": 3},
}
GLOBAL = {"local_gate": False, "weight_noise": 0}


def uneven(**options):
    options = {"task_type": "CAUSAL_LM", **GLOBAL, **UNEVEN, **options}
    return stir(adapt(tiny_lm("llama"), **options), 0.1).eval()


def by_peft(folder):
    """What PEFT adds to each layer."""
    model = PeftModel.from_pretrained(tiny_lm("llama"), folder)
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def same(first, second):
    assert first.keys() == second.keys()
    assert len(first) == 4
    return all(torch.allclose(first[n], second[n], atol=1e-6, rtol=1e-5) for n in first)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_every_server_reads_the_same_adapter(options, tmp_path):
    model = uneven(**options)
    bara.export_lora(model, tmp_path / "patterns", mode="draws", num_draws=2, patterns=True)
    exported = bara.export_lora(model, tmp_path / "one", mode="draws", num_draws=2)
    assert exported.refusals == {"vllm": None, "sglang": None}
    for draw in ("draw-0", "draw-1"):
        config = json.loads((tmp_path / "one" / draw / "adapter_config.json").read_text())
        assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
        assert config["r"] == 4
        kept = json.loads((tmp_path / "patterns" / draw / "adapter_config.json").read_text())
        assert kept["rank_pattern"] == UNEVEN["rank_pattern"]
        expected = by_peft(tmp_path / "patterns" / draw)
        assert same(by_peft(tmp_path / "one" / draw), expected)
        for rule in (vllm, older_vllm, sglang):
            assert same(rule(tmp_path / "one" / draw), expected)
        # and with patterns only those are right that read them
        assert same(vllm(tmp_path / "patterns" / draw), expected)
        for rule in (older_vllm, sglang):
            assert not same(rule(tmp_path / "patterns" / draw), expected)


def test_an_even_adapter_stays_as_it_is(tmp_path):
    model = stir(adapt(tiny_lm("llama"), "blob", task_type="CAUSAL_LM"), 0.1).eval()
    bara.export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    delta = next(iter(sglang(tmp_path).values()))
    expected = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(delta, expected.detach())


def sequence_classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(tiny_llama(num_labels=3, initializer_range=0.3).config)


def with_noise(model, part, scale):
    """Gaussian noise of one size on every weight whose name has `part`."""
    named = {n: p for n, p in model.named_parameters() if part in n}
    factors = {n: Factors(torch.full_like(p, scale)) for n, p in named.items()}
    attach_draws(model, WeightDraws(model, factors))
    return model


def test_a_classifier_on_a_decoder_has_a_head_in_every_draw(tmp_path):
    """Served as vLLM does, with noise on the head too: the client's average is bara's."""
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS", "r": 2}
    model = stir(get_peft_model(sequence_classifier(), LoraConfig(**options)), 0.3).eval()
    with_noise(model, "modules_to_save", 0.3)
    exported = bara.export_lora(model, tmp_path, mode="draws", num_draws=4, seed=2, server="vllm")
    assert "reads no modules_to_save" in exported.refusals["sglang"]
    text = words(5, 9, 20)
    ids = word_tokenizer()(text, return_tensors="pt")["input_ids"]
    expected = bara.predict(model, {"input_ids": ids}, num_draws=4, seed=2)
    server = LoraServer(sequence_classifier(), word_tokenizer())
    with server.running() as url:
        ensemble = Ensemble.from_folder(tmp_path, url=url)
        ensemble.load(tmp_path)
        answer = ensemble.classify(text)
    heads = [model.score.weight for model in server.models.values()]
    assert not any(torch.equal(heads[0], head) for head in heads[1:])
    names = [f"LABEL_{i}" for i in range(3)]
    assert list(answer.probabilities) == names
    found = torch.tensor([answer.probabilities[name] for name in names])
    torch.testing.assert_close(found, expected.probs[0].float(), atol=1e-5, rtol=1e-4)
    assert answer.epistemic == pytest.approx(expected.epistemic_uncertainty.item(), abs=1e-5)
    assert answer.epistemic > 1e-3


@pytest.fixture
def folder(tmp_path):
    """A causal-lm adapter with a posterior, made from a plain one."""
    base = tmp_path / "base"
    tiny_lm("llama").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    options = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    plain = stir(get_peft_model(tiny_lm("llama"), config), 0.3)
    plain.peft_config["default"].base_model_name_or_path = str(base)
    plain.save_pretrained(tmp_path / "lora")
    rows = [{"prompt": words(i, 5) + " ", "completion": words(6, 7)} for i in range(10, 20)]
    table = write_jsonl(tmp_path / "texts.jsonl", rows)
    bara.bayesianize(tmp_path / "lora", str(table), tmp_path / "posterior")
    return tmp_path / "posterior"


def test_draws_are_loaded_and_whole_answers_scored(
    folder, tmp_path, run, failing, monkeypatch, capsys
):
    """From the command to the numbers: the scores are those of `bara.multiple_choice`."""
    server = LoraServer(tiny_lm("llama"), word_tokenizer())
    out, key = tmp_path / "draws", tmp_path / "key"
    key.write_text("secret\n")
    command = ["export", folder, "--mode", "draws", "--num-draws", 3, "--seed", 1, "--output", out]
    with server.running() as url:
        printed = run(*command, "--load-into", url, "--api-key-file", key)
        assert f"Loaded 3 draws into {url}" in printed
        assert server.keys == {"Bearer secret"}
        assert "has already been loaded" in failing(*command, "--force", "--load-into", url)
        ensemble = Ensemble.from_folder(out, url=url)
        prompt, answers = words(10, 5), [" " + words(6, 7, 9), " " + words(12), " " + words(3, 4)]
        answer = ensemble.score(prompt, answers)
        with pytest.raises(EnsembleError, match="do not begin where the prompt ends"):
            ensemble.score(prompt + "4", ["5"])
        monkeypatch.setattr("bara.export.client.__file__", str(out / "client.py"))
        capsys.readouterr()
        assert main([prompt, "--answers", *answers, "--url", url]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["probabilities"] == pytest.approx(answer.probabilities)
    model, tokenizer, _ = bara.load_adapter(folder)
    asked = {"prompt": prompt, "choices": [a[1:] for a in answers]}
    expected = bara.multiple_choice(model, tokenizer, [asked], num_draws=3, seed=1)
    found = torch.tensor(list(answer.probabilities.values()), dtype=torch.float64)
    torch.testing.assert_close(found, expected.probs[0].double(), atol=1e-5, rtol=1e-4)
    assert answer.epistemic == pytest.approx(expected.epistemic_uncertainty.item(), abs=1e-5)
    # the likelihood of the first answer, token by token, under the mixture
    ids = torch.tensor([tokenizer(prompt + answers[0])["input_ids"]])
    total = []
    for draw in range(3):
        with torch.no_grad(), bara.sampling(model, seed=1, first_draw=draw):
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total.append(logs[range(1, 4), ids[0, 2:]].sum())
    mixture = torch.stack(total).logsumexp(0) - torch.tensor(3.0).log()
    assert answer.log_likelihoods[answers[0]] == pytest.approx(mixture.item(), rel=1e-4)
    assert "--load-into is for --mode draws" in failing(
        "export", folder, "--output", tmp_path / "x", "--load-into", url
    )
    assert "cannot be reached" in failing(*command, "--force", "--load-into", url)


def test_whole_answers_are_scored_at_the_temperature_of_the_model(tmp_path):
    """Of multiple choice every adapter has one, and its files' weights do not."""
    model, tokenizer = uneven(), word_tokenizer()
    set_temperature(model, 0.2)
    bara.export_lora(model, tmp_path, mode="draws", num_draws=3, seed=1)
    prompt, choices = words(10, 5), [words(6, 7, 9), words(12), words(3, 4)]
    server = LoraServer(tiny_lm("llama"), tokenizer)
    with server.running() as url:
        ensemble = Ensemble.from_folder(tmp_path, url=url)
        ensemble.load(tmp_path)
        answer = ensemble.score(prompt, [f" {choice}" for choice in choices])
    asked = {"prompt": prompt, "choices": choices}
    expected = bara.multiple_choice(model, tokenizer, [asked], num_draws=3, seed=1)
    found = torch.tensor(list(answer.probabilities.values()), dtype=torch.float64)
    torch.testing.assert_close(found, expected.probs[0].double(), atol=1e-5, rtol=1e-4)
    assert found.max() > 0.4  # at 1 they are all near 1/3


def test_what_a_server_cannot_load_is_refused(tmp_path, tiny_bert):
    conv = stir(adapt(TinyConv(), "blob", target_modules=["conv"])).eval()
    two = stir(adapt(tiny_bert, "blob", modules_to_save=["pooler"], task_type="SEQ_CLS")).eval()
    three = stir(adapt(tiny_lm("llama"), "blob", lora_bias=True, target_modules=["q_proj"])).eval()
    gates = stir(adapt(tiny_lm("llama"), target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    for model, server, message in [
        (conv, "vllm", "conv is a convolution"),
        (two, "vllm", "one linear `classifier` or `score`"),
        (two, "sglang", "reads no modules_to_save"),
        (three, "vllm", "with biases"),
        (gates, "vllm", "depends on the input"),
        (uneven(), "ollama", "server must be vllm or sglang"),
    ]:
        with pytest.raises(BaraError, match=message):
            bara.export_lora(model, tmp_path / "out", server=server)
    with pytest.raises(BaraError, match="export without --patterns"):
        bara.export_lora(uneven(), tmp_path / "out", server="sglang", patterns=True)
    assert not (tmp_path / "out").exists()
    assert "convolution" in bara.export_lora(conv, tmp_path / "out").refusals["vllm"]
    bara.export_lora(conv, tmp_path / "draws", mode="draws", num_draws=1)
    manifest = json.loads((tmp_path / "draws" / "manifest.json").read_text())
    assert "convolution" in manifest["refused_by"]["vLLM 0.33.0"]


class TwoHeads(TinyConv):
    """A model with both of the heads that vLLM knows."""

    def __init__(self):
        super().__init__()
        self.classifier, self.score = nn.Linear(8, 4), nn.Linear(8, 4)


def test_two_heads_are_refused(tmp_path):
    options = {"target_modules": ["head"], "modules_to_save": ["classifier", "score"]}
    model = stir(adapt(TwoHeads(), "blob", **options)).eval()
    with pytest.raises(BaraError, match="loads one head, and this adapter has 2"):
        bara.export_lora(model, tmp_path / "out", server="vllm")
    assert not (tmp_path / "out").exists()


def test_linearised_draws_are_refused(tmp_path):
    options = {"target_modules": ["q_proj"], "task_type": "SEQ_CLS", "r": 2}
    model = stir(get_peft_model(sequence_classifier(), LoraConfig(**options)), 0.3).eval()
    named = {n: p for n, p in model.named_parameters() if "lora_" in n}
    factors = {n: Factors(torch.ones_like(p)) for n, p in named.items()}
    attach_draws(model, WeightDraws(model, factors, linearised=True))
    with pytest.raises(BaraError, match="predicts with a linearised model"):
        bara.export_lora(model, tmp_path / "draws", mode="draws")
    mean = bara.export_lora(model, tmp_path / "mean")
    assert mean.refusals["vllm"] is None
