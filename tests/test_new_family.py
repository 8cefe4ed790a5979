"""The posterior family of docs/contributing.md, from outside of the package: one file is enough."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft import mapping as peft_mapping
from torch.distributions import Normal, kl_divergence

import bara
from bara.finetuning.finetune import finetune
from bara.methods.recipe import TrainRecipe
from bara.methods.table import METHODS
from bara.posteriors.registry import FAMILIES
from helpers import TinyNet, layer_posterior, stir

PAGE = Path(__file__).parents[1] / "docs" / "contributing.md"


@pytest.fixture
def family(tmp_path):
    """The page's module, which is gone afterwards."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)[1]
    path = tmp_path / "factor_noise.py"
    path.write_text(code, "utf-8")
    spec = importlib.util.spec_from_file_location("factor_noise", path)
    module = sys.modules["factor_noise"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["factor_noise"], FAMILIES["factor-noise"], METHODS["factor-noise"]
    for mapping in (
        peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        peft_mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    ):
        del mapping["FACTOR-NOISE"]


def adapted(family, **options):
    torch.manual_seed(0)
    config = family.FactorNoiseConfig(r=4, lora_alpha=8, target_modules=["layer"], **options)
    return get_peft_model(TinyNet(), config)


def test_it_trains_its_elbo(family):
    model = stir(adapted(family, num_observations=20, warmup=0.0), 0.05).train()
    x, y = torch.randn(5, 6), torch.randn(5, 5)
    torch.manual_seed(1)
    outputs = model(x=x, labels=y)
    _, posterior = layer_posterior(model)
    std = torch.exp(10 * posterior.log_std.detach())
    expected = kl_divergence(Normal(torch.zeros(4), std), Normal(torch.zeros(4), 0.5)).sum()
    assert bara.kl_terms(model)["kl_global"] == pytest.approx(expected.item(), rel=1e-5)
    data = (outputs["logits"] - y).square().mean()
    torch.testing.assert_close(outputs["loss"], data + expected / 20)
    outputs["loss"].backward()
    assert posterior.log_std.grad.abs().min() > 0


def test_its_draws_are_the_formula_and_survive_saving_under_another_name(family, tmp_path):
    model = stir(adapted(family), 0.05).eval()
    layer, posterior = layer_posterior(model)
    x = torch.randn(3, 6)
    with torch.no_grad(), bara.sampling(model, num_draws=2, seed=5) as draws:
        logits = model(x=x.repeat(2, 1))["logits"].view(2, 3, -1)
    eps = draws.numbers("layer/eps", "normal", (4,), torch.device("cpu"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for d in range(2):
        scale = 1 + torch.exp(10 * posterior.log_std) * eps[d]
        expected = layer.base_layer(x) + 2.0 * (x @ a.T * scale) @ b.T
        torch.testing.assert_close(logits[d], expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(TinyNet(), tmp_path / "saved", adapter_name="mine").eval()
    with torch.no_grad(), bara.sampling(loaded, num_draws=2, seed=5):
        again = loaded(x=x.repeat(2, 1))["logits"].view(2, 3, -1)
    torch.testing.assert_close(again, logits)


def test_a_posterior_with_modules_survives_saving_under_another_name(family, tmp_path, monkeypatch):
    make = family.FactorNoisePosterior.__init__

    def with_module(self, setup):
        make(self, setup)
        self.inner = torch.nn.Linear(2, 2)

    monkeypatch.setattr(family.FactorNoisePosterior, "__init__", with_module)
    model = stir(adapted(family), 0.05)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TinyNet(), tmp_path, adapter_name="mine")
    for layer in (model.base_model.model.layer, loaded.base_model.model.layer):
        (posterior,) = layer.lora_posterior.values()
        torch.testing.assert_close(posterior.inner.weight, layer_posterior(model)[1].inner.weight)


def test_it_exports_merges_and_refuses_to_be_pruned(family, tmp_path):
    model = stir(adapted(family), 0.05).eval()
    x = torch.randn(3, 6)
    with torch.no_grad(), bara.sampling(model, seed=2):
        drawn = model(x=x)["logits"]
    bara.export_lora(model, tmp_path / "draws", mode="draws", num_draws=1, seed=2)
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(TinyNet(), tmp_path / "draws" / "draw-0").eval()
    torch.testing.assert_close(plain(x=x)["logits"], drawn, atol=1e-5, rtol=1e-5)
    rank = bara.effective_rank(model, {"x": x})
    assert rank.s_bar == 4
    with pytest.raises(bara.BaraError, match="BaRA"):
        bara.prune(model, {"x": x})
    mean = model(x=x)["logits"]
    torch.testing.assert_close(model.merge_and_unload()(x=x)["logits"], mean, atol=1e-5, rtol=1e-5)


def test_it_is_a_method_of_bara_train(family, tiny_model_dir, tmp_path):
    table = Dataset.from_dict({"text": ["good film", "bad plot"] * 4, "label": ["+", "-"] * 4})
    training = {"learning_rate": 0.03, "use_cpu": True, "save_strategy": "no"}
    recipe = TrainRecipe(
        model=str(tiny_model_dir),
        output=str(tmp_path / "out"),
        method="factor-noise",
        method_options={"prior_std": 0.25},
        training=training,
    )
    model, tokenizer, _ = bara.load_adapter(finetune(recipe, table), device="cpu")
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert (stored["peft_type"], stored["prior_std"]) == ("FACTOR-NOISE", 0.25)
    assert stored["resolved"]["num_observations"] == 8
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "factor noise (docs/contributing.md), Gaussian noise of a learned size" in card
    rows = tokenizer(list(table["text"]), return_tensors="pt", padding=True)
    predictive = bara.predict(model, dict(rows), num_draws=5, progress=False)
    assert predictive.epistemic_uncertainty.max() > 0
    assert METHODS["factor-noise"].random == "the factors' scale"


def test_another_family_of_the_same_name_is_refused(family):
    about = family.FactorNoiseConfig.ABOUT
    with pytest.raises(ValueError, match="factor-noise"):
        family.register(bara.BlobConfig, family.FactorNoisePosterior, about)
