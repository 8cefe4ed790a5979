"""What every posterior family does as a PEFT adapter: one list of behaviours for all of them."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

import bara
from bara import BaraError
from bara.draws.draws import attach_draws
from bara.methods.weight_draws import WeightDraws
from bara.posteriors.registry import FAMILIES
from helpers import layer_posterior, stir, tiny_llama

METHODS = sorted(FAMILIES)
WITHOUT_HEADS = [method for method in METHODS if FAMILIES[method].head is None]
MERGES = [method for method in METHODS if method not in ("bara", "certified", "clora")]
IDS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(0))


def config(method, **options):
    options = {"r": 4, "lora_alpha": 8, "num_observations": 50} | options
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    return FAMILIES[method].config(**options)


def adapted(method, seed=1, **options):
    torch.manual_seed(seed)
    return stir(get_peft_model(tiny_llama(), config(method, **options)), 0.2, seed).eval()


def draws(model, mean=False):
    """Logits of two draws, or of the posterior mean."""
    with torch.no_grad():
        if mean:
            return model(input_ids=IDS).logits
        with bara.sampling(model, num_draws=2, seed=3):
            return model(input_ids=IDS.repeat(2, 1)).logits


def require_same(one, other):
    for mean in (True, False):
        actual, expected = (draws(model, mean=mean) for model in (one, other))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def saved(method, tmp_path):
    """Two adapters that differ, and their folders."""
    models = [adapted(method, seed) for seed in (1, 2)]
    folders = [tmp_path / name for name in ("first", "second")]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    assert not torch.allclose(draws(models[0]), draws(models[1]), atol=1e-3)
    return models, folders


def test_the_draws_differ_from_the_mean_and_from_each_other(method):
    model = adapted(method)
    first, second = draws(model).chunk(2)
    mean = draws(model, mean=True)
    for one, other in ((first, mean), (second, mean), (first, second)):
        assert not torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["default", "other", "with-dash"])
def test_saved_under_one_name_and_loaded_under_another(saved, name, low_cpu_mem_usage):
    models, folders = saved
    loaded = PeftModel.from_pretrained(
        tiny_llama(), folders[0], adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    require_same(loaded, models[0])
    again = folders[0].parent / "again"
    loaded.save_pretrained(again)
    folder = again if name == "default" else again / name
    require_same(PeftModel.from_pretrained(tiny_llama(), folder).eval(), models[0])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_second_adapter_beside_the_first(saved, low_cpu_mem_usage):
    models, folders = saved
    both = PeftModel.from_pretrained(tiny_llama(), folders[0], adapter_name="one").eval()
    both.load_adapter(folders[1], "two", low_cpu_mem_usage=low_cpu_mem_usage)
    for name, model in zip(("one", "two"), models, strict=True):
        both.set_adapter(name)
        require_same(both.eval(), model)
    both.delete_adapter("one")
    both.set_adapter("two")
    require_same(both.eval(), models[1])
    assert not any(".one" in key for key in both.state_dict())
    with pytest.raises((ValueError, KeyError)):
        both.set_adapter("one")


def test_rows_of_a_mixed_batch_have_their_own_adapter(saved):
    models, folders = saved
    both = PeftModel.from_pretrained(tiny_llama(), folders[0], adapter_name="one").eval()
    both.load_adapter(folders[1], "two")
    with torch.no_grad():
        mixed = both.eval()(input_ids=IDS, adapter_names=["one", "two", "__base__"]).logits
        with both.disable_adapter():
            base = both(input_ids=IDS).logits
    expected = [draws(models[0], mean=True)[0], draws(models[1], mean=True)[1], base[2]]
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_disabled_adapter_is_the_base_model(method):
    model = adapted(method)
    before = draws(model)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=IDS).logits, tiny_llama().eval()(input_ids=IDS).logits
        )
    assert torch.equal(draws(model), before)


def test_merging_is_exact_or_refused(method):
    model = adapted(method)
    mean = draws(model, mean=True)
    if method not in MERGES:
        with pytest.raises(BaraError):
            model.merge_adapter()
        assert torch.equal(draws(model, mean=True), mean)
        with pytest.raises(BaraError):
            model.merge_and_unload()
        return
    model.merge_adapter()
    torch.testing.assert_close(draws(model, mean=True), mean, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(draws(model, mean=True), mean, atol=1e-4, rtol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(draws(merged, mean=True), mean, atol=1e-4, rtol=1e-4)
    assert type(merged) is type(tiny_llama())


@pytest.mark.parametrize("method", [*MERGES, "lora"])
def test_a_tied_weight_is_merged_only_where_no_adapter_is_on_it(method, tmp_path):
    def tied(*target):
        options = {"r": 4, "target_modules": ["q_proj", *target], "task_type": "CAUSAL_LM"}
        options |= {} if method == "lora" else {"num_observations": 50}
        kind = LoraConfig if method == "lora" else FAMILIES[method].config
        model = get_peft_model(tiny_llama(tie_word_embeddings=True), kind(**options))
        model = stir(model, 0.2).eval()
        if method == "lora":  # TFB, Laplace, ...: what exports it needs no variance here
            attach_draws(model, WeightDraws(model, {}))
        return model

    def export(model, name):
        bara.export_lora(model, tmp_path / name, mode="merged")
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()

    free = tied()
    expected = draws(free, mean=True)
    torch.testing.assert_close(draws(export(free, "free"), mean=True), expected, atol=1e-4, rtol=0)
    free.merge_adapter()
    torch.testing.assert_close(draws(free, mean=True), expected, atol=1e-4, rtol=0)
    model = tied("lm_head")
    expected = draws(model, mean=True)
    message = r"lm_head cannot be merged: its weight is that of model\.embed_tokens too"
    ways = [lambda: export(model, "tied")]
    ways += [model.merge_adapter, model.merge_and_unload] if method != "lora" else []
    for way in ways:
        with pytest.raises(BaraError, match=message):
            way()
    assert torch.equal(draws(model, mean=True), expected)
    layer = model.get_base_model().lm_head.base_layer  # what the message advises
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    model.config.tie_word_embeddings = False
    merged = export(model, "untied")
    torch.testing.assert_close(draws(merged, mean=True), expected, atol=1e-4, rtol=0)


def test_unloading_gives_the_base_model_back(method):
    base = adapted(method).unload()
    torch.testing.assert_close(draws(base, mean=True), draws(tiny_llama().eval(), mean=True))
    assert "bara_elbo" not in base.__dict__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision(method, dtype):
    model = adapted(method)
    expected = draws(model)
    tolerance = 1e-4 if dtype == torch.float64 else 0.2
    actual = draws(model.to(dtype))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("autocast", [True, False])
def test_an_adapter_on_a_half_precision_base_is_in_float32_as_lora_is(method, autocast):
    base = tiny_llama().to(torch.bfloat16)
    model = get_peft_model(base, config(method), autocast_adapter_dtype=autocast)
    lora = get_peft_model(
        tiny_llama().to(torch.bfloat16),
        LoraConfig(target_modules=["q_proj", "v_proj"]),
        autocast_adapter_dtype=autocast,
    )
    expected = {p.dtype for n, p in lora.named_parameters() if "lora_" in n}
    found = {p.dtype for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
    assert found == expected


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_predicts_the_same_and_is_independent(method, way):
    model = adapted(method)
    expected = draws(model)
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    require_same(other.eval(), model)
    stir(other, 0.3, seed=9)
    assert torch.equal(draws(model), expected)
    assert not torch.allclose(draws(other), expected, atol=1e-3)
    other.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.equal(draws(model), expected)


def test_hot_swapping_gives_the_other_adapter_or_is_refused(saved, method):
    models, folders = saved
    model = PeftModel.from_pretrained(tiny_llama(), folders[0]).eval()
    if method not in WITHOUT_HEADS:
        with pytest.raises(ValueError, match="Hotswapping only supports"):
            hotswap_adapter(model, str(folders[1]), "default")
        return
    hotswap_adapter(model, str(folders[1]), "default")
    require_same(model.eval(), models[1])


def test_hot_swapping_makes_a_calibration_stale(tmp_path):
    """The averages of the adapter that came are merged, not those of the one that is gone."""
    model, other = adapted("bara", 1), adapted("bara", 2)
    other.save_pretrained(tmp_path)
    bara.calibrate_gates(model, {"input_ids": IDS})
    before = draws(model, mean=True)
    model.merge_adapter()
    merged = draws(model, mean=True)
    model.unmerge_adapter()
    torch.testing.assert_close(draws(model, mean=True), before, rtol=1e-4, atol=1e-4)
    again = copy.deepcopy(model)
    again.merge_adapter()  # the calibration outlives merging, unmerging and a copy
    torch.testing.assert_close(draws(again, mean=True), merged, rtol=1e-4, atol=1e-4)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    with pytest.raises(BaraError, match="calibrate_gates"):
        model.merge_adapter()
    with pytest.raises(BaraError, match="calibrate_gates"):
        bara.export_lora(model, tmp_path / "export")
    for one in (model, other):
        bara.calibrate_gates(one, {"input_ids": IDS})
        one.merge_adapter()
    torch.testing.assert_close(draws(model, mean=True), draws(other, mean=True))
    assert not torch.allclose(draws(model, mean=True), merged, atol=1e-2)


def test_another_precision_leaves_a_calibration():
    model = adapted("bara")
    bara.calibrate_gates(model, {"input_ids": IDS})
    model.bfloat16().merge_adapter()


@pytest.mark.parametrize("method", WITHOUT_HEADS)
def test_hot_swapping_another_rank_is_refused(method, tmp_path):
    model = adapted(method)
    adapted(method, r=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"incompatible: for \w+, "):
        hotswap_adapter(model, str(tmp_path), "default")


def test_hot_swapping_does_not_change_the_noise_without_a_word(tmp_path):
    model, other = adapted("bara"), adapted("bara", 2)
    bara.set_progress(other, 0.0, num_steps=80)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="used_by_draws"):
        hotswap_adapter(model, str(tmp_path), "default")


def test_a_mixed_model_is_refused_by_name(method):
    with pytest.raises(ValueError, match=config(method).peft_type):
        get_peft_model(tiny_llama(), config(method), mixed=True)


def test_transformers_loads_the_folder(saved, tmp_path):
    """`AutoModel....from_pretrained(adapter folder)`, and `load_adapter` of its models."""
    models, folders = saved
    tiny_llama().save_pretrained(tmp_path / "base")
    path = folders[0] / "adapter_config.json"
    stored = json.loads(path.read_text("utf-8")) | {
        "base_model_name_or_path": str(tmp_path / "base")
    }
    path.write_text(json.dumps(stored), "utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    require_same(loaded, models[0])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(folders[1]))
    require_same(loaded.eval(), models[1])


def test_weighted_adapters_are_refused(saved):
    _, folders = saved
    model = PeftModel.from_pretrained(tiny_llama(), folders[0], adapter_name="one")
    with pytest.raises(BaraError, match="cannot be combined"):
        model.add_weighted_adapter(["one"], [1.0], "sum")


def test_only_the_new_adapter_is_trained(method):
    model = get_peft_model(tiny_llama(), config(method))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    model.add_adapter("second", config(method))
    now = {n for n, p in model.named_parameters() if p.requires_grad}
    assert now == trained
    model.set_adapter("second")
    now = {n for n, p in model.named_parameters() if p.requires_grad}
    assert now == {name.replace(".default", ".second") for name in trained}
    _, posterior = layer_posterior(model)
    assert not any(p.requires_grad for p in posterior.parameters())


def test_saving_names_no_adapter(saved):
    """The name is not part of the file, whatever a posterior is made of."""
    from safetensors import safe_open

    for folder in saved[1]:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            assert not any("default" in key for key in file.keys())  # noqa: SIM118


def test_the_folder_says_what_to_import(saved):
    """PEFT alone cannot read it: the card and the configuration say what it takes."""
    folder = saved[1][0]
    card = (folder / "README.md").read_text("utf-8")
    assert "import bara" in card
    stored = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert "import bara" in stored["needs"]
