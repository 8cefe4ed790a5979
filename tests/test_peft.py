"""PEFT's operations on BaRA and BaLoRA adapters."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.lora.te import TeLinear
from safetensors.torch import load_file
from torch import nn

import bara
from bara import BaloraConfig, BaraConfig, BaraError
from bara.adapter.peft_020 import ASKS_THE_MODEL
from helpers import (
    CONFIGS,
    TinyConv,
    TinyNet,
    adapt,
    granular,
    layer_posterior,
    stir,
    tiny_gpt2,
    tiny_llama,
)

METHODS = list(CONFIGS)
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
IDS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(0))


def logits(model, seed=None, **inputs):
    inputs = inputs or {"input_ids": IDS}
    model.eval()
    with torch.no_grad():
        if seed is None:
            return model(**inputs)["logits"]
        with bara.sampling(model, seed=seed):
            return model(**inputs)["logits"]


# -- what we rely on in PEFT ---------------------------------------------------------------------


def test_the_private_surface_of_peft_that_we_use_is_there():
    """A failure here means that PEFT moved something: adapt src/bara/tuner.py to the new place."""
    from peft import mapping

    for name in ("CONFIG", "TUNER", "PREFIX"):
        registered = getattr(mapping, f"PEFT_TYPE_TO_{name}_MAPPING", None)
        assert registered is not None, f"PEFT no longer has PEFT_TYPE_TO_{name}_MAPPING"
        assert "BARA" in registered
    for method in ("init", "forward", "merge_safe", "merge_unsafe", "unmerge"):
        assert hasattr(LoraVariant, method), f"PEFT's LoraVariant lost {method}"
    layer = get_peft_model(TinyNet(), LoraConfig(target_modules=["layer"])).base_model.model.layer
    assert isinstance(layer, LoraLayer)
    for attribute in ("lora_variant", "adapter_layer_names", "lora_A", "lora_B", "scaling", "r"):
        assert hasattr(layer, attribute), f"PEFT's LoraLayer lost {attribute}"
    assert hasattr(layer, "_move_adapter_to_device_of_base_layer")
    from peft.tuners.lora import LoraModel

    for method in (
        "_create_and_replace",
        "_enable_peft_forward_hooks",
        "_unload_and_optionally_merge",
        "delete_adapter",
    ):
        assert hasattr(LoraModel, method), f"PEFT's LoraModel lost {method}"


# -- saving and loading --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(method, name, tmp_path):
    model = stir(adapt(MODELS[name](), method, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is CONFIGS[method]
    assert config.num_observations == 50
    loaded = PeftModel.from_pretrained(MODELS[name](), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(loaded, seed=1), logits(model, seed=1), atol=1e-6, rtol=0)
    assert not torch.equal(logits(loaded, seed=1), logits(loaded))
    lean = PeftModel.from_pretrained(MODELS[name](), tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(lean, seed=1), logits(model, seed=1), atol=1e-6, rtol=0)


OTHER_PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from helpers import tiny_llama
from peft import PeftModel
import bara
model = PeftModel.from_pretrained(tiny_llama(), sys.argv[2]).eval()
ids = torch.load(sys.argv[2] + "/ids.pt")
with torch.no_grad(), bara.sampling(model, num_draws=3, seed=11):
    torch.save(model(input_ids=ids.repeat(3, 1)).logits, sys.argv[2] + "/logits.pt")
"""


def test_another_process_predicts_the_same(tmp_path):
    model = stir(adapt(tiny_llama(), task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path)
    torch.save(IDS, tmp_path / "ids.pt")
    subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, os.path.dirname(__file__), str(tmp_path)], check=True
    )
    with torch.no_grad(), bara.sampling(model, num_draws=3, seed=11):
        ours = model(input_ids=IDS.repeat(3, 1)).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours, atol=1e-6, rtol=0)


def test_the_saved_file_holds_the_posterior_and_no_base_weights(tmp_path):
    stir(adapt(tiny_llama(), task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in names)
    for part in ("global_logit", "gate_weight", "gate_bias", "noise_logit"):
        assert any(name.endswith(f"lora_posterior.{part}") for name in names)


# -- several adapters ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_add_set_disable_and_delete_adapters(method):
    base = tiny_llama()
    plain = logits(base)
    model = stir(adapt(base, method, task_type="CAUSAL_LM"))
    first = logits(model, seed=0)
    config = CONFIGS[method](r=2, num_observations=9, task_type="CAUSAL_LM")
    model.add_adapter("other", config)
    torch.testing.assert_close(logits(model, seed=0), first)
    model.set_adapter("other")
    torch.testing.assert_close(logits(model, seed=0), plain, atol=1e-6, rtol=0)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lora_posterior.other" in name for name in trainable) == (method != "mc-dropout")
    assert not any(".default" in name for name in trainable)
    model.set_adapter("default")
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, seed=0), plain)
    torch.testing.assert_close(logits(model, seed=0), first)
    model.delete_adapter("other")
    assert not any(".other" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(logits(model, seed=0), first)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_joins_a_model_in_evaluation_mode_is_at_its_mean(method):
    model = adapt(tiny_llama(), method, task_type="CAUSAL_LM").eval()
    model.add_adapter("other", CONFIGS[method](r=2, num_observations=9, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    stir(model, scale=0.5)
    with torch.no_grad():
        as_it_is = model(input_ids=IDS).logits
    torch.testing.assert_close(as_it_is, logits(model), atol=0, rtol=0)
    model.train()
    assert all(module.training for module in model.modules())


def test_a_model_that_trains_in_the_mode_it_was_loaded_in_is_told():
    """transformers loads in evaluation mode, in which there is no KL: PEFT's LoRA trains all the
    same, so that a loop without train() is easily written."""
    model = adapt(tiny_llama().eval(), task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match=r"Call model.train\(\)"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert bara.adapter.elbo.elbo_of(model).last is None


def test_disabled_adapters_train_without_kl_and_without_complaint():
    model = stir(adapt(tiny_llama(), task_type="CAUSAL_LM", num_observations=None)).train()
    with model.disable_adapter():
        loss = model(input_ids=IDS, labels=IDS, num_items_in_batch=18).loss
    base = tiny_llama().train()(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, base)


@pytest.mark.parametrize("method", METHODS)
def test_mixed_batches(method, tiny_bert):
    """Every row under its own adapter, with padding, in mean mode and under draws."""
    pooled = {"task_type": "SEQ_CLS", **granular(method, "sequence")}
    model = stir(adapt(tiny_bert, method, **pooled))
    config = CONFIGS[method](r=4, num_observations=9, **pooled)
    model.add_adapter("other", config)
    model.set_adapter("other")
    stir(model, seed=2)
    ids = torch.randint(5, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 3:] = mask[2, 4:] = 0
    names = ["default", "other", "default", "__base__"]
    with torch.no_grad():
        for seed in (None, 5):
            expected = []
            for i, name in enumerate(names):
                row = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
                if name == "__base__":
                    with model.disable_adapter():
                        expected.append(hidden(model, row, seed))
                else:
                    model.set_adapter(name)
                    expected.append(hidden(model, row, seed))
            batch = {"input_ids": ids, "attention_mask": mask, "adapter_names": names}
            mixed = hidden(model, batch, seed)
            torch.testing.assert_close(mixed, torch.cat(expected), atol=1e-5, rtol=1e-4)


def hidden(model, inputs, seed):
    """The first token's last state: modules_to_save would hide the adapters' heads."""
    model.eval()
    if seed is None:
        return model(**inputs, output_hidden_states=True).hidden_states[-1][:, 0]
    with bara.sampling(model, seed=seed):
        return model(**inputs, output_hidden_states=True).hidden_states[-1][:, 0]


# -- options of LoraConfig -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_patterns_scaling_targets_and_saved_modules(method, tiny_bert, tmp_path):
    model = adapt(
        copy.deepcopy(tiny_bert),
        method,
        task_type="SEQ_CLS",
        target_modules="all-linear",
        rank_pattern={"query": 2},
        alpha_pattern={"query": 6},
        use_rslora=True,
        modules_to_save=["classifier"],
        lora_dropout=0.1,
        lora_bias=True,
    )
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_posterior")}
    query = next(m for n, m in layers.items() if n.endswith("query"))
    dense = next(m for n, m in layers.items() if n.endswith("intermediate.dense"))
    assert query.lora_posterior["default"].rank == query.r["default"] == 2
    assert query.scaling["default"] == pytest.approx(6 / 2**0.5)
    assert dense.lora_posterior["default"].rank == 4
    assert dense.scaling["default"] == pytest.approx(8 / 4**0.5)
    stir(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_bert), tmp_path)
    inputs = {"input_ids": torch.arange(5, 11).view(1, 6)}
    torch.testing.assert_close(logits(loaded, 3, **inputs), logits(model, 3, **inputs))
    classifier = loaded.base_model.model.classifier.modules_to_save["default"]
    assert not torch.equal(classifier.weight, tiny_bert.classifier.weight)


# -- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["balora", "bara without local gate"])
def test_merging_is_exact_where_the_mean_is_a_matrix(kind, name, safe):
    options = {} if kind == "balora" else {"local_gate": False}
    model = stir(adapt(MODELS[name](), kind.split(" ")[0], task_type="CAUSAL_LM", **options))
    model.peft_config["default"].resolved.num_observations = None
    mean = logits(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model), mean, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), mean, atol=1e-4, rtol=1e-4)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(logits(merged), mean, atol=1e-4, rtol=1e-4)
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    merged.train()(input_ids=IDS, labels=IDS)  # no hook is left behind to ask for N
    assert not hasattr(merged, "bara_elbo")


def test_merging_an_input_dependent_gate_is_refused_and_changes_nothing():
    model = stir(adapt(tiny_llama(), task_type="CAUSAL_LM"))
    before = logits(model)
    with pytest.raises(BaraError, match="calibrate_gates"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), before, atol=0, rtol=0)


def test_calibrated_gates_merge_at_their_average():
    torch.manual_seed(0)
    model = stir(adapt(TinyNet(), target_modules=["layer"])).eval()
    layer, posterior = layer_posterior(model)
    x = torch.randn(40, 6)
    bara.calibrate_gates(model, {"x": x})
    with torch.no_grad():
        u = x @ layer.lora_A["default"].weight.T
        h = u / u.square().mean(-1, keepdim=True).sqrt()
        v = (torch.arange(20_000) + 0.5) / 20_000
        shift = 0.66 * torch.log((v + 0.1) / (1.1 - v))
        local = 100 * (h @ posterior.gate_weight.T / 2 + posterior.gate_bias)
        g = torch.sigmoid(local.unsqueeze(-1) - shift).mean(-1).mean(0)
        z = torch.sigmoid((100 * posterior.global_logit).unsqueeze(-1) - shift).mean(-1)
        b = layer.lora_B["default"].weight * (z * g)
        expected = layer.base_layer(x) + 2.0 * u @ b.T
        unmerged = model(x=x)["logits"]
        model.merge_adapter()
        torch.testing.assert_close(model(x=x)["logits"], expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(unmerged, expected, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x=x)["logits"], unmerged, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_save_load_and_merge(method, tmp_path):
    options = {"local_gate": False} if method == "bara" else {}
    torch.manual_seed(0)
    base = TinyConv()
    model = stir(adapt(copy.deepcopy(base), method, target_modules=["conv"], **options)).eval()
    x = torch.randn(2, 3, 6, 6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad(), bara.sampling(model, seed=0), bara.sampling(loaded, seed=0):
        torch.testing.assert_close(loaded(pixel_values=x), model(pixel_values=x))
    if method == "clora":  # has no merged form
        return
    with torch.no_grad():
        mean = model(pixel_values=x)["logits"]
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(pixel_values=x)["logits"], mean, atol=1e-5, rtol=1e-4)


def test_grouped_convolutions():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, groups=2)

        def forward(self, x):
            return {"logits": self.conv(x)}

    torch.manual_seed(0)
    model = stir(adapt(Grouped(), target_modules=["conv"])).train()
    model(x=torch.randn(2, 4, 5, 5))
    layer, _ = layer_posterior(model)
    b = layer.lora_B["default"].weight  # (8, 2, 1, 1): columns 0, 1 belong to the first 4 outputs
    expected = [b[4 * (k // 2) : 4 * (k // 2) + 4, k % 2].square().sum().item() for k in range(4)]
    seen = []
    model.eval()
    elbo = model.base_model.model.bara_elbo
    with elbo.observing(lambda name, posterior, space: seen.append(space.squared_columns())):
        model(x=torch.randn(2, 4, 5, 5))
    assert seen[0].tolist() == pytest.approx(expected)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"num_observations": 0}, "num_observations must be"),
        ({"kl_weight": -1.0}, "kl_weight must be a number in"),
        ({"kl_weight": float("nan")}, "kl_weight must be"),
        ({"warmup": 1.5}, "warmup must be a number in"),
        ({"granularity": "word"}, "granularity must be 'auto', 'sequence' or 'token'"),
        ({"global_prior": 1.0}, "global_prior must be"),
        ({"local_prior": 0}, "local_prior must be"),
        ({"noise_prior": 0.0}, "noise_prior must be"),
        ({"prior_std": 0.0}, "prior_std must be a number in .* or None"),
        ({"use_dora": True}, "use_dora selects another variant"),
        ({"use_qalora": True}, "use_qalora cannot be combined"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be .* start with B = 0"),
        (
            {"global_gate": False, "local_gate": False, "factor_noise": False, "weight_noise": 0},
            "no posterior left",
        ),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(BaraError, match=message):
        BaraConfig(**options)


@pytest.mark.parametrize("method", ["balora", "blob", "rankwise"])
def test_only_bara_can_do_without_a_kl_weight(method):
    assert BaraConfig(kl_weight=None).kl_weight is None
    with pytest.raises(BaraError, match="kl_weight must be a number"):
        CONFIGS[method](kl_weight=None)


def test_impossible_balora_configurations_are_refused():
    with pytest.raises(BaraError, match="dropout_prior must be"):
        BaloraConfig(dropout_prior=1.0)
    with pytest.raises(BaraError, match="hidden_size must be"):
        BaloraConfig(hidden_size=0)


def test_every_field_is_documented():
    from dataclasses import fields

    inherited = {field.name for field in fields(LoraConfig)}
    for config in (BaraConfig, BaloraConfig):
        for field in fields(config):
            if field.name not in inherited:
                assert len(field.metadata["help"]) > 20, field.name


def test_a_sequence_gate_on_a_language_model_is_refused():
    with pytest.raises(BaraError, match="the future"):
        adapt(tiny_llama(), task_type="CAUSAL_LM", granularity="sequence")
    with pytest.raises(BaraError, match="the future"):
        adapt(tiny_gpt2(), granularity="sequence")  # told from the model, not the task


def test_embeddings_are_refused():
    with pytest.raises(BaraError, match=r"cannot adapt .*embed_tokens"):
        adapt(tiny_llama(), target_modules=["embed_tokens"])


def test_parameters_are_refused():
    """PEFT's `target_parameters`, which its wrapper adapts without knowing what layer it is in."""
    with pytest.raises(BaraError, match=r"the parameter layer\.weight: leave target_parameters"):
        get_peft_model(TinyNet(), BaraConfig(target_parameters=["layer.weight"]))


class OwnForward(lora.Linear):
    """A layer of the user's, as `_register_custom_module` takes it, that computes plain LoRA."""

    def forward(self, x):
        a, b = (getattr(self, part)["default"] for part in ("lora_A", "lora_B"))
        return self.base_layer(x) + b(a(x)) * self.scaling["default"]


class CallsSuper(lora.Linear):
    def forward(self, x):
        return super().forward(x)


class OwnMerge(lora.Linear):
    """Merges as PEFT's layers of torchao do."""

    def merge(self, safe_merge=False, adapter_names=None):
        self.base_layer.weight.data += self.get_delta_weight("default")
        self.merged_adapters.append("default")


@pytest.mark.parametrize("kind", [TeLinear, AwqLoraLinear, AqlmLoraLinear, OwnForward])
@pytest.mark.parametrize("method", ["bara", "balora", "mc-dropout"])
def test_layers_that_would_go_past_the_posterior_are_refused(kind, method):
    config = CONFIGS[method](target_modules=["layer"], num_observations=9)
    config._register_custom_module({nn.Linear: kind})
    with pytest.raises(BaraError, match=f"cannot adapt layer: {kind.__name__} computes plain LoRA"):
        get_peft_model(TinyNet(), config)


def test_layers_of_the_user_that_ask_the_posterior_have_one():
    x = torch.randn(4, 6)
    outputs = {}
    for kind in (lora.Linear, CallsSuper, OwnMerge):
        torch.manual_seed(0)
        config = BaraConfig(target_modules=["layer"], num_observations=9)
        config._register_custom_module({nn.Linear: kind})
        model = stir(get_peft_model(TinyNet(), config)).eval()
        assert type(model.base_model.model.layer) is kind
        outputs[kind] = logits(model, seed=1, x=x)
        assert not torch.equal(outputs[kind], logits(model, seed=2, x=x))
    torch.testing.assert_close(outputs[CallsSuper], outputs[lora.Linear])
    torch.testing.assert_close(outputs[OwnMerge], outputs[lora.Linear])


@pytest.mark.parametrize("method", ["scalabl", "balora"])
def test_a_merge_that_would_leave_the_factors_scale_out_is_refused(method):
    config = CONFIGS[method](r=2, target_modules=["layer"], num_observations=9)
    config._register_custom_module({nn.Linear: OwnMerge})
    model = stir(get_peft_model(TinyNet(), config)).eval()
    x = torch.randn(4, 6)
    before = logits(model, x=x)
    if method == "scalabl":  # its mean multiplies the factors
        with pytest.raises(BaraError, match="OwnMerge merges A and B without"):
            model.merge_adapter()
    else:  # its mean is A and B
        model.merge_adapter()
    torch.testing.assert_close(logits(model, x=x), before, atol=1e-5, rtol=1e-5)


def test_a_configuration_survives_json(tmp_path):
    config = BaraConfig(init_noise=0.3, target_modules=["a"], kl_weight=0.5)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "BARA"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.init_noise == 0.3
    assert loaded.kl_weight == 0.5


# -- two adapters at once ------------------------------------------------------------------------


def two_adapters(rank):
    torch.manual_seed(0)
    model = adapt(TinyNet(), target_modules=["layer"])
    config = BaraConfig(r=rank, lora_alpha=8, num_observations=9, target_modules=["layer"])
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    return stir(model).eval()


def test_adapters_of_different_rank_draw_together():
    model = two_adapters(rank=2)
    x = torch.randn(3, 6)
    with bara.sampling(model, seed=0):
        both = model(x=x)["logits"]
    assert both.shape == (3, 5)
    with pytest.raises(BaraError, match="set_adapter"):
        bara.effective_rank(model, {"x": x})


def test_adapters_that_are_active_together_draw_independently():
    model = two_adapters(rank=4)
    layer, _ = layer_posterior(model)
    keys = [layer.lora_variant[name].noise_key(layer, name) for name in ("default", "other")]
    assert keys == ["layer", "layer#1"]
    x = torch.randn(1, 6)

    def draws():
        with torch.no_grad(), bara.sampling(model, num_draws=4000, seed=0):
            return model(x=x.repeat(4000, 1))["logits"]

    together = draws().var(0)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(draws().var(0))
    torch.testing.assert_close(together, alone[0] + alone[1], rtol=0.25, atol=1e-3)


def test_weighted_combinations_are_refused():
    model = two_adapters(rank=4)
    with pytest.raises(BaraError, match="weighted"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")


def test_a_refused_merge_leaves_every_layer_as_it_was():
    model = stir(adapt(tiny_llama(), task_type="CAUSAL_LM"))
    layers = [m for m in model.modules() if hasattr(m, "lora_posterior")]
    for layer in layers[:-1]:
        layer.lora_posterior["default"].calibrated = torch.ones(4)
    with pytest.raises(BaraError, match="calibrate_gates"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers)
    with pytest.raises(BaraError, match="calibrate_gates"):
        model.merge_and_unload()
    assert sum(hasattr(m, "lora_posterior") for m in model.modules()) == len(layers)


def test_training_makes_a_calibration_stale():
    torch.manual_seed(0)
    model = stir(adapt(TinyNet(), target_modules=["layer"]))
    x = torch.randn(8, 6)
    bara.calibrate_gates(model, {"x": x})
    model.train()(x=x)
    with pytest.raises(BaraError, match="calibrate_gates"):
        model.merge_adapter()


def test_weights_that_are_loaded_make_a_calibration_stale(tmp_path):
    model = stir(adapt(TinyNet(), target_modules=["layer"]))
    model.save_pretrained(tmp_path)
    bara.calibrate_gates(model, {"x": torch.randn(8, 6)})
    model.load_adapter(tmp_path, "default")
    with pytest.raises(BaraError, match="calibrate_gates"):
        model.merge_adapter()


@pytest.mark.parametrize("method", ["bara", "balora"])
def test_a_bias_of_b_is_scaled_as_in_peft(method):
    options = {"local_gate": False} if method == "bara" else {}
    options |= {"target_modules": ["layer"], "lora_alpha": 12, "lora_bias": True}
    model = stir(adapt(TinyNet(), method, **options)).eval()
    x = torch.randn(4, 6)
    before = model(x=x)["logits"]
    model.merge_adapter()
    torch.testing.assert_close(model(x=x)["logits"], before, atol=1e-5, rtol=1e-5)


def test_trained_biases_of_the_base_model_are_saved_or_refused(tmp_path):
    options = {"target_modules": ["layer"], "bias": "all"}
    if not ASKS_THE_MODEL:
        with pytest.raises(BaraError, match="bias='all' needs peft"):
            adapt(TinyNet(), **options)
        return
    base = TinyNet()
    fresh = copy.deepcopy(base)
    model = stir(adapt(base, **options)).eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(4, 6)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(loaded(x=x)["logits"], model(x=x)["logits"])


def test_peft_does_not_convert_an_adapter_without_its_posterior():
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapt(TinyNet(), target_modules=["layer"]), rank=2)


def test_a_model_with_an_adapter_is_copied_and_pickled():
    model = stir(adapt(TinyNet(), target_modules=["layer"])).eval()
    x = torch.randn(4, 6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x=x)["logits"], model(x=x)["logits"])
        state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        other.load_state_dict(state)
        assert not other(x=x)["logits"].any()
        assert model(x=x)["logits"].any()


def test_peft_can_attach_to_no_layer_at_all():
    config = BaraConfig(target_modules="dummy-target-modules")
    model = get_peft_model(TinyNet(), config)
    assert model.peft_config["default"].resolved.kl_weight == 1 / 6


@pytest.mark.parametrize(
    ("rank", "task", "text"),
    [(1, 0.5, 0.25), (2, 0.5, 0.25), (8, 0.125, 0.25), (64, 1 / 64, 0.25), (128, 1 / 128, 0.125)],
)
def test_what_is_expected_of_a_layer_does_not_grow_with_the_maximum_rank(rank, task, text):
    config = BaraConfig(r=rank)
    assert (config.global_prior, config.local_prior) == (task, text)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"scalabl"}))  # its A is orthogonal
def test_a_seed_gives_every_layer_the_a_of_plain_lora(method):
    """A comparison with LoRA at one seed then differs in the method, not in where it starts."""
    targets = ["q_proj", "v_proj"]
    model = tiny_llama()
    torch.manual_seed(3)
    plain = get_peft_model(model, LoraConfig(target_modules=targets))
    expected = {k: v for k, v in plain.state_dict().items() if "lora_A" in k}
    model = tiny_llama()
    torch.manual_seed(3)
    actual = get_peft_model(model, CONFIGS[method](target_modules=targets)).state_dict()
    assert len(expected) == 4
    for name, a in expected.items():
        assert torch.equal(actual[name], a), name


def test_the_undocumented_parts_of_peft_that_are_used():
    """What docs/other-tools.md lists; a PEFT that changes one fails here, and by its name."""
    import inspect

    from peft import mapping
    from peft.tuners.lora import LoraModel
    from peft.tuners.lora.layer import LoraLayer, LoraVariant
    from peft.utils import hotswap

    overridden = {
        "_create_and_replace": "lora_config adapter_name target target_name parent current_key",
        "_check_target_module_exists": "peft_config key",
        "_unload_and_optionally_merge": "merge",
        "_enable_peft_forward_hooks": "",
        "inject_adapter": "model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict",
    }
    if ASKS_THE_MODEL:
        overridden |= {
            "_remap_adapter_state_dict_for_load": "model config adapter_name state_dict",
            "_remove_adapter_name_from_key": "key adapter_name",
        }
    for name, arguments in overridden.items():
        given = inspect.signature(getattr(LoraModel, name)).parameters
        assert set(arguments.split()) <= set(given), name
    assert "lora_variant" in vars(LoraLayer(torch.nn.Linear(2, 2)))
    assert callable(LoraVariant.forward)
    for table in ("CONFIG", "TUNER", "PREFIX"):
        assert "LORA" in getattr(mapping, f"PEFT_TYPE_TO_{table}_MAPPING")
    assert hotswap.CONFIG_KEYS_TO_CHECK
