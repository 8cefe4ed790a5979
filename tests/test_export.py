"""Exports: loaded in a process that cannot import bara, and compared with the original."""

import copy
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, convert_to_lora
from safetensors.torch import load_file
from torch import nn
from transformers import BertModel, PretrainedConfig

import bara
from bara import BaraError
from bara.adapter.layer import adapted_layers
from bara.models.sentence import SentenceClassifier
from bara.prediction.predictive import ClassificationPredictive
from conftest import tiny_bert_config
from helpers import TinyNet, adapt, balora_network, layer_posterior, stir, tiny_gpt2, tiny_llama

DRAWS, SEED = 3, 5
FOR_LANGUAGE_MODELS = {("bara", "mean"), ("global", "draws"), ("balora", "mean")}
"""What is exported of them; of classifiers, everything."""

WITHOUT_BARA = """
import json, sys
sys.modules["bara"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
for job in json.load(open(sys.argv[1])):
    auto = {"cls": AutoModelForSequenceClassification, "lm": AutoModelForCausalLM}[job["kind"]]
    model = auto.from_pretrained(job["base"])
    names = [f"draw-{i}" for i in range(job.get("draws", 0))]
    inputs, extra = torch.load(job["inputs"]), {}
    if names:  # a mixed batch: block d of the rows is for draw d
        model = PeftModel.from_pretrained(model, job["folder"] + "/draw-0", adapter_name="draw-0")
        for name in names[1:]:
            model.load_adapter(job["folder"] + "/" + name, adapter_name=name)
        rows = len(inputs["input_ids"])
        inputs = {key: value.repeat(len(names), 1) for key, value in inputs.items()}
        extra["adapter_names"] = [name for name in names for _ in range(rows)]
    elif "folder" in job:
        model = PeftModel.from_pretrained(model, job["folder"])
    with torch.no_grad():
        torch.save(model.eval()(**inputs, **extra).logits, job["output"])
assert sys.modules["bara"] is None
"""


def outputs(model, data):
    with torch.no_grad():
        output = model(**data)
    return output["logits"]


def factors(weights, name, layer):
    """A and B of a layer without the padding of their rank and the scaling that is in B."""
    prefix, r = f"base_model.model.{name}", layer.r["default"]
    a, b = (weights[f"{prefix}.lora_{part}.weight"] for part in "AB")
    assert not a[r:].any()
    assert not b[:, r:].any()
    return a[:r], b[:, :r] / layer.scaling["default"]


def uneven(method, base, **options):
    """An adapter with different ranks and scalings in its layers."""
    patterns = {"rank_pattern": {"0.attention.self.value": 2, "0.self_attn.v_proj": 2}}
    model = stir(adapt(base, method, **patterns, use_rslora=True, **options), 0.1)
    return model.eval()


class Exported:
    """Models with their exports, and what another process made of these."""

    def __init__(self, folder: Path, tiny_bert: nn.Module) -> None:
        self.folder = folder
        self.jobs: list[dict[str, object]] = []
        torch.manual_seed(0)
        ids = torch.randint(5, 20, (6, 7))
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.save(self.inputs, folder / "inputs.pt")
        self.models: dict[str, PeftModel] = {}
        tiny_bert.save_pretrained(folder / "cls")
        tiny_llama().save_pretrained(folder / "lm")
        bases = {"cls": lambda: copy.deepcopy(tiny_bert), "lm": tiny_llama}
        tasks = {"cls": "SEQ_CLS", "lm": "CAUSAL_LM"}
        for kind, base in bases.items():
            for method, options in (
                ("bara", {}),
                ("balora", {}),
                ("global", {"local_gate": False, "weight_noise": 0}),
            ):
                family = "balora" if method == "balora" else "bara"
                model = uneven(family, base(), task_type=tasks[kind], **options)
                for mode in ("mean", "draws", "merged"):
                    if kind == "cls" or (method, mode) in FOR_LANGUAGE_MODELS:
                        self.add(kind, method, mode, model)
        (folder / "jobs.json").write_text(json.dumps(self.jobs))
        command = [sys.executable, "-c", WITHOUT_BARA, str(folder / "jobs.json")]
        subprocess.run(command, check=True, capture_output=True)

    def add(self, kind: str, method: str, mode: str, model: PeftModel) -> None:
        name = f"{kind}-{method}-{mode}"
        target = self.folder / name
        needed = None if method == "global" else self.inputs
        bara.export_lora(
            model, target, mode=mode, data=needed, num_draws=DRAWS, seed=SEED, progress=False
        )
        self.models[f"{kind}-{method}"] = model
        job = {
            "kind": kind,
            "base": str(target if mode == "merged" else self.folder / kind),
            "inputs": str(self.folder / "inputs.pt"),
            "output": str(self.folder / f"{name}.pt"),
        }
        job |= {} if mode == "merged" else {"folder": str(target)}
        job |= {"draws": DRAWS} if mode == "draws" else {}
        self.jobs.append(job)

    def logits(self, kind: str, method: str, mode: str) -> torch.Tensor:
        return torch.load(self.folder / f"{kind}-{method}-{mode}.pt")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    bert = BertForSequenceClassification(tiny_bert_config(num_labels=3))
    return Exported(tmp_path_factory.mktemp("exports"), bert)


def constant_mean(model, data):
    """The model with every local gate at its average over data, worked out from the gates."""
    model = copy.deepcopy(model)
    sums: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, layer, posterior in adapted_layers(model, "default"):

        def record(module, args, u, name=name, posterior=posterior):
            h = u / u.square().mean(-1, keepdim=True).sqrt()
            logit = 100 * (h @ posterior.gate_weight.T / posterior.rank**0.5 + posterior.gate_bias)
            noise = torch.logit(torch.linspace(0.00005, 0.99995, 10000))
            gate = ((logit[..., None] + noise) / 0.66).sigmoid() * 1.2 - 0.1
            sums[name] = gate.clamp(0, 1).mean(-1).flatten(0, -2)

        handles.append(layer.lora_A["default"].register_forward_hook(record))
    outputs(model, data)
    for handle in handles:
        handle.remove()
    return {name: gates.mean(0) for name, gates in sums.items()}


@pytest.mark.parametrize(
    ("kind", "method", "mode"),
    [
        ("cls", "balora", "mean"),
        ("cls", "balora", "merged"),
        ("cls", "global", "mean"),
        ("cls", "global", "merged"),
        ("lm", "balora", "mean"),
    ],
)
def test_exact_where_nothing_of_the_mean_depends_on_the_input(exported, kind, method, mode):
    model = exported.models[f"{kind}-{method}"]
    expected = outputs(model, exported.inputs)
    torch.testing.assert_close(exported.logits(kind, method, mode), expected, atol=2e-6, rtol=1e-5)
    with model.disable_adapter():
        assert (outputs(model, exported.inputs) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["cls", "lm"])
def test_local_gates_are_at_their_average(exported, kind):
    model = exported.models[f"{kind}-bara"]
    average = constant_mean(model, exported.inputs)
    weights = load_file(exported.folder / f"{kind}-bara-mean" / "adapter_model.safetensors")
    for name, layer, posterior in adapted_layers(model, "default"):
        noise = torch.logit(torch.linspace(0.00005, 0.99995, 10000))
        gate = ((100 * posterior.global_logit[:, None] + noise) / 0.66).sigmoid() * 1.2 - 0.1
        scale = gate.clamp(0, 1).mean(-1) * average[name]
        torch.testing.assert_close(
            factors(weights, name, layer)[1],
            (layer.lora_B["default"].weight * scale).detach(),
            atol=1e-4,
            rtol=1e-3,
        )


def test_merged_is_the_mean(exported):
    merged, mean = (exported.logits("cls", "bara", mode) for mode in ("merged", "mean"))
    torch.testing.assert_close(merged, mean, atol=2e-6, rtol=1e-5)


def test_the_card_of_a_merged_model_loads_it(exported):
    folder = exported.folder / "cls-bara-merged"
    _, code, _ = (folder / "README.md").read_text("utf-8").split("```", 2)
    names: dict[str, Any] = {}
    exec(code.removeprefix("python").replace("path/to/this/folder", str(folder)), names)
    expected = exported.logits("cls", "bara", "merged")
    torch.testing.assert_close(outputs(names["model"], exported.inputs), expected)
    assert "library_name: transformers" in (folder / "README.md").read_text("utf-8")


@pytest.mark.parametrize("kind", ["cls", "lm"])
def test_draws_in_a_mixed_batch_are_those_of_sampling(exported, kind):
    model = exported.models[f"{kind}-global"]
    blocks = {key: value.repeat(DRAWS, 1) for key, value in exported.inputs.items()}
    with bara.sampling(model, num_draws=DRAWS, seed=SEED):
        expected = outputs(model, blocks)
    drawn = exported.logits(kind, "global", "draws")
    torch.testing.assert_close(drawn, expected, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(drawn[:6], drawn[6:12], atol=1e-4)


def test_draws_keep_local_gates_at_their_average(exported):
    model = exported.models["cls-bara"]
    average = constant_mean(model, exported.inputs)
    folder = exported.folder / "cls-bara-draws"
    for draw in range(DRAWS):
        weights = load_file(folder / f"draw-{draw}" / "adapter_model.safetensors")
        for name, layer, posterior in adapted_layers(model, "default"):
            b = layer.lora_B["default"].weight
            scale = (factors(weights, name, layer)[1] / b).mean(0) / average[name]
            # z (1 + sqrt(alpha) eps), where z is 0 ... 1
            alpha = torch.exp(100 * posterior.noise_logit)
            bound = 1 + 5 * alpha.sqrt()
            assert (scale.abs() <= bound).all()


def test_bara_draws_sample_a_with_its_fixed_noise(exported):
    model, folder = exported.models["cls-bara"], exported.folder / "cls-bara-draws"
    files = [load_file(p / "adapter_model.safetensors") for p in folder.glob("draw-*")]
    assert len(files) == DRAWS
    for name, layer, posterior in adapted_layers(model, "default"):
        a = layer.lora_A["default"].weight.detach()
        drawn = torch.stack([factors(f, name, layer)[0] for f in files])
        standard = (drawn - a) / a.abs()
        c, count = posterior.resolved.weight_noise, standard.numel()
        assert c > 0
        assert standard.mean().abs() < 5 * (c / count) ** 0.5
        assert standard.square().mean().item() == pytest.approx(c, rel=6 * (2 / count) ** 0.5)


def test_balora_draws_sample_a_with_the_average_noise(exported):
    model = copy.deepcopy(exported.models["cls-balora"])
    folder = exported.folder / "many"
    bara.export_lora(model, folder, mode="draws", data=exported.inputs, num_draws=100, seed=1)
    files = [load_file(p / "adapter_model.safetensors") for p in folder.glob("draw-*")]
    for name, layer, posterior in adapted_layers(model, "default"):
        a = layer.lora_A["default"].weight.detach()
        drawn = torch.stack([factors(f, name, layer)[0] for f in files])
        standard = (drawn - a) / a.abs()
        alphas = []
        handle = layer.lora_A["default"].register_forward_hook(
            lambda module, args, u, p=posterior, out=alphas: out.append(
                torch.nn.functional.softplus(
                    10 * balora_network(p, _pooled(u) / _pooled(u).square().mean(-1, True).sqrt())
                ).mean()
            )
        )
        outputs(model, exported.inputs)
        handle.remove()
        variance = standard.square().mean()
        count = standard.numel()
        assert standard.mean().abs() < 5 * (variance / count).sqrt()
        assert variance.item() == pytest.approx(alphas[0].item(), rel=6 * (2 / count) ** 0.5)
        unit = factors(files[0], name, layer)[1]
        torch.testing.assert_close(unit, layer.lora_B["default"].weight.detach())


def _pooled(u):
    return u.mean(dim=1)


def test_the_trained_head_travels(exported):
    model = exported.models["cls-bara"]
    head = model.get_base_model().classifier.modules_to_save["default"].weight
    for folder in ("cls-bara-mean", "cls-bara-draws/draw-1"):
        weights = load_file(exported.folder / folder / "adapter_model.safetensors")
        torch.testing.assert_close(weights["base_model.model.classifier.weight"], head)
        assert not any("posterior" in key for key in weights)
    merged = load_file(exported.folder / "cls-bara-merged" / "model.safetensors")
    torch.testing.assert_close(merged["classifier.weight"], head)


def test_manifest_and_client_are_beside_the_draws(exported):
    folder = exported.folder / "lm-global-draws"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["adapters"] == [f"draw-{d}" for d in range(DRAWS)]
    assert manifest["seed"] == SEED
    command = [sys.executable, "-S", "-E", folder / "client.py", "--help"]
    assert b"--choices" in subprocess.run(command, check=True, capture_output=True).stdout


def test_the_difference_is_that_of_the_files(exported, tmp_path):
    """Measured in this process, and again from what the other process read."""
    model = exported.models["cls-bara"]
    held_out = exported.inputs
    exact = outputs(model, held_out).softmax(-1)
    mean = bara.export_lora(model, tmp_path / "a", data=held_out, held_out=held_out)
    plain = exported.logits("cls", "bara", "mean").softmax(-1)
    distance = 0.5 * (exact - plain).abs().sum(-1)
    assert mean.difference.mean == pytest.approx(distance.mean().item(), rel=1e-2)
    assert mean.difference.largest == pytest.approx(distance.max().item(), rel=1e-2)
    options = {"num_draws": DRAWS, "seed": SEED, "held_out": held_out}
    draws = bara.export_lora(model, tmp_path / "b", mode="draws", **options)
    mixture = exported.logits("cls", "bara", "draws").view(DRAWS, 6, 3).softmax(-1).mean(0)
    predictive = bara.predict(model, held_out, num_draws=DRAWS, seed=SEED)
    assert isinstance(predictive, ClassificationPredictive)
    distance = 0.5 * (predictive.probs - mixture).abs().sum(-1)
    assert draws.difference.mean == pytest.approx(distance.mean().item(), rel=1e-2)
    assert draws.difference.num_inputs == 6
    torch.testing.assert_close(outputs(model, held_out).softmax(-1), exact)


def test_a_pruned_adapter_exports(exported, tmp_path, tiny_bert):
    model = copy.deepcopy(exported.models["cls-bara"])
    for _, _, posterior in adapted_layers(model, "default"):
        posterior.global_logit.data[:] = 0.2
        posterior.global_logit.data[0] = -1.0
    pruned = bara.prune(model, exported.inputs).model
    export = bara.export_lora(pruned, tmp_path, data=exported.inputs, held_out=exported.inputs)
    loaded = PeftModel.from_pretrained(tiny_bert, tmp_path).eval()
    probs = outputs(loaded, exported.inputs).softmax(-1)
    exact = outputs(pruned, exported.inputs).softmax(-1)
    distance = 0.5 * (exact - probs).abs().sum(-1)
    assert export.difference.mean == pytest.approx(distance.mean().item(), rel=1e-2, abs=1e-7)


def test_pefts_own_tools_take_the_export(exported):
    base = tiny_llama()
    plain = PeftModel.from_pretrained(base, exported.folder / "lm-bara-mean").eval()
    expected = outputs(plain, exported.inputs)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        config, tensors = convert_to_lora(plain, rank=1.0)
    assert config.r <= 4
    assert tensors
    merged = plain.merge_and_unload()
    torch.testing.assert_close(outputs(merged, exported.inputs), expected, atol=2e-6, rtol=1e-5)


def test_conv1d_layers(tmp_path):
    model = stir(adapt(tiny_gpt2(), task_type="CAUSAL_LM", fan_in_fan_out=True), 0.1).eval()
    data = {"input_ids": torch.randint(3, 60, (3, 5))}
    bara.calibrate_gates(model, data)
    bara.export_lora(model, tmp_path)
    plain = outputs(PeftModel.from_pretrained(tiny_gpt2(), tmp_path).eval(), data)
    merged = outputs(copy.deepcopy(model).merge_and_unload(), data)
    torch.testing.assert_close(plain, merged, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("other", "rank"), [(6, 6), (7, 8)])
@pytest.mark.parametrize("mode", ["mean", "draws"])
def test_grouped_convolutions_beside_another_rank(other, rank, mode, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3)
            self.second = nn.Conv2d(8, 8, 3, groups=2)
            self.config = PretrainedConfig()

        def forward(self, x):
            return {"logits": self.second(self.first(x)).mean((2, 3))}

    options = {"target_modules": ["first", "second"], "r": 4, "rank_pattern": {"first": other}}
    model = stir(adapt(Net(), local_gate=False, weight_noise=0.0, **options)).eval()
    data = {"x": torch.randn(2, 3, 8, 8)}
    for patterns in (False, True):
        folder = tmp_path / str(patterns)
        bara.export_lora(model, folder, mode=mode, num_draws=1, seed=3, patterns=patterns)
        drawn = mode == "draws"
        plain = PeftModel.from_pretrained(Net(), folder / "draw-0" if drawn else folder).eval()
        with bara.sampling(model, seed=3) if drawn else nullcontext():
            expected = outputs(model, data)
        torch.testing.assert_close(outputs(plain, data), expected, atol=1e-5, rtol=1e-4)
        layer = plain.get_base_model().second
        assert layer.r["default"] == (4 if patterns else rank)


def test_a_sentence_classifier_becomes_a_sentence_transformer(tmp_path, tiny_tokenizer):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    encoder = BertModel(tiny_bert_config(num_labels=3))
    model = adapt(SentenceClassifier(encoder), "balora", task_type="SEQ_CLS")
    model = stir(model, 0.1).eval()
    bara.export_lora(model, tmp_path, mode="merged")
    tiny_tokenizer.save_pretrained(tmp_path)
    texts = ["the film was great", "a bad plot , and cold food !"]
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    embedding = torch.tensor(loaded.encode(texts, show_progress_bar=False))
    assert "SentenceTransformer(" in (tmp_path / "README.md").read_text("utf-8")
    batch = tiny_tokenizer(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    torch.testing.assert_close(embedding, outputs(model, batch), atol=1e-5, rtol=1e-4)


def test_refusals(exported, tmp_path, monkeypatch):
    model = copy.deepcopy(exported.models["cls-bara"])
    for _, _, posterior in adapted_layers(model, "default"):
        posterior.calibrated = None
    for mode in ("mean", "draws", "merged"):
        with pytest.raises(BaraError, match="give calibration inputs"):
            bara.export_lora(model, tmp_path / "out", mode=mode)
    with pytest.raises(BaraError, match="The data set is empty"):
        bara.export_lora(model, tmp_path / "out", data=[])
    with pytest.raises(BaraError, match="mode must be one of mean, draws, merged, not 'best'"):
        bara.export_lora(model, tmp_path / "out", mode="best")
    with pytest.raises(BaraError, match="num_draws must be at least 1"):
        bara.export_lora(model, tmp_path / "out", mode="draws", num_draws=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(BaraError, match="is not empty"):
        bara.export_lora(model, tmp_path / "full", data=exported.inputs)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**5))
    with pytest.raises(BaraError, match=r"1000000 adapters would take .* MB free"):
        bara.export_lora(
            model, tmp_path / "out", mode="draws", num_draws=10**6, data=exported.inputs
        )
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    bara.export_lora(model, tmp_path / "full", data=exported.inputs, overwrite=True)
    assert (tmp_path / "full" / "mine").read_text() == "mine"
    net = stir(adapt(TinyNet(), "balora", target_modules=["layer"]))
    with pytest.raises(BaraError, match="for transformers models, not TinyNet"):
        bara.export_lora(net, tmp_path / "net", mode="merged")
    plain = PeftModel.from_pretrained(tiny_llama(), exported.folder / "lm-bara-mean")
    with pytest.raises(BaraError, match="needs a Bayesian adapter; this one's method is LORA"):
        bara.export_lora(plain, tmp_path / "plain")
    layer_posterior(net)[0].merge()
    with pytest.raises(BaraError, match="not merged"):
        bara.export_lora(net, tmp_path / "net")
