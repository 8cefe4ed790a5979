"""A configuration stays what the user wrote; the attached adapter has its own numbers."""

import copy
import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import bara
from bara import BaraConfig, BaraError
from bara.methods.recipe import TrainRecipe
from bara.methods.table import check_recipe
from helpers import CONFIGS, TinyNet, adapt, layer_posterior, stir, tiny_llama

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def numbers(model, name="default"):
    return model.peft_config[name].resolved


def test_attaching_changes_nothing_of_the_users_object():
    config = BaraConfig(r=4, **TARGETS)
    before = asdict(config)
    model = get_peft_model(tiny_llama(), config)
    bara.set_progress(model, 0.5, num_steps=80)
    given = {"base_model_name_or_path", "target_modules"}  # which PEFT fills in
    after = asdict(config)
    assert {k: v for k, v in after.items() if k not in given} == {
        k: v for k, v in before.items() if k not in given
    }
    assert config.resolved is None
    assert numbers(model).weight_noise == 2.0


def test_one_configuration_for_two_models_of_other_depths():
    config = BaraConfig(r=4, **TARGETS)
    kl_weights = [
        numbers(get_peft_model(tiny_llama(num_hidden_layers=n), config)).kl_weight for n in (1, 24)
    ]
    assert kl_weights == [1 / 6, 6 / 48]


def test_what_is_saved_says_both(tmp_path):
    model = get_peft_model(tiny_llama(num_hidden_layers=12), BaraConfig(r=4, **TARGETS))
    bara.set_progress(model, 0.5, num_steps=80)
    numbers(model).num_observations = 77
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert stored["kl_weight"] is None
    assert stored["weight_noise"] is None
    assert stored["num_observations"] is None
    assert stored["resolved"] == {
        "num_observations": 77,
        "frozen_nll": None,
        "kl_weight": 1 / 12,
        "local_kl_weight": 0.0005,
        "strength": 1.0,
        "warmup": 0.5,
        "head_pace": 1.0,
        "warmup_by_head": True,
        "init_noise": 0.25,
        "weight_noise": 2.0,
        "whole": {
            "kl_weight": 1 / 6,
            "local_kl_weight": 0.001,
            "init_noise": 0.5,
            "weight_noise": 4.0,
        },
        "trained_steps": 80.0,
    }
    loaded = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=12), tmp_path)
    assert numbers(loaded) == numbers(model)
    bara.set_progress(loaded.train(), 0.0, num_steps=1000)  # nothing of it is trained
    assert numbers(loaded).weight_noise == 2.0
    trained = PeftModel.from_pretrained(
        tiny_llama(num_hidden_layers=12), tmp_path, is_trainable=True
    )
    bara.set_progress(trained, 0.0, num_steps=1000)
    assert numbers(trained).weight_noise == 4.0


@pytest.mark.parametrize(
    ("steps", "rate", "part"),
    [(20, None, 0), (50, 1e-3, 1 / 8), (80, 3e-3, 1 / 2), (120, None, 1), (400, 2e-4, 1 / 2)],
)
def test_a_short_training_has_less_kl_and_noise(steps, rate, part):
    """(steps - 40) / 80, in steps at a rate of 1e-3; an eighth at least of all but A's noise."""
    model = get_peft_model(tiny_llama(num_hidden_layers=12), BaraConfig(r=4, **TARGETS))
    bara.set_progress(model, 0.0, steps, rate)
    noise, others = part, max(part, 1 / 8)
    resolved, posterior = numbers(model), layer_posterior(model)[1]
    assert resolved.weight_noise == pytest.approx(4.0 * noise)
    assert resolved.kl_weight == pytest.approx(others / 6)
    assert resolved.local_kl_weight == pytest.approx(0.001 * others)
    alpha = (100 * posterior.noise_logit.detach()).exp()
    torch.testing.assert_close(alpha, torch.full((4,), 0.5 * others))


def test_the_callback_tells_the_rate_of_the_optimiser(tiny_bert, tmp_path):
    rows = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor(i % 2)} for i in range(4)]
    for options, steps in (({"learning_rate": 2e-4}, 12), ({"optimizers": "own"}, 30)):
        model = adapt(copy.deepcopy(tiny_bert), target_modules=["query"], num_observations=None)
        if options.pop("optimizers", None):
            trained = [p for p in model.parameters() if p.requires_grad]
            options["optimizers"] = (torch.optim.AdamW(trained, lr=5e-4), None)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=60, report_to="none", save_strategy="no", use_cpu=True,
            learning_rate=options.pop("learning_rate", 1.0), per_device_train_batch_size=1,
        )  # fmt: skip
        callbacks = [bara.BayesianCallback(), *[StopAtOnce()]]
        Trainer(model, arguments, train_dataset=rows, callbacks=callbacks, **options).train()
        assert numbers(model).trained_steps == pytest.approx(steps)


class StopAtOnce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_few_steps_leave_what_is_given_and_what_is_trained():
    config = BaraConfig(r=4, kl_weight=0.3, init_noise=0.2, **TARGETS)
    model = get_peft_model(tiny_llama(num_hidden_layers=12), config)
    bara.set_progress(model, 0.0, num_steps=50)
    posterior = layer_posterior(model)[1]
    assert numbers(model).kl_weight == 0.3
    assert numbers(model).local_kl_weight == pytest.approx(0.001 / 8)
    torch.testing.assert_close((100 * posterior.noise_logit.detach()).exp(), torch.full((4,), 0.2))
    model = get_peft_model(tiny_llama(num_hidden_layers=12), BaraConfig(r=4, **TARGETS))
    posterior = layer_posterior(model)[1]
    with torch.no_grad():
        posterior.noise_logit[1] += 0.01  # a step
    trained = posterior.noise_logit.detach().clone()
    bara.set_progress(model, 0.0, num_steps=50)
    torch.testing.assert_close(posterior.noise_logit.detach(), trained, rtol=0, atol=0)


def test_a_number_given_later_is_in_force():
    model = get_peft_model(TinyNet(), BaraConfig(r=4, target_modules=["layer"], warmup=0.0)).train()
    x = torch.randn(3, 6)
    with pytest.raises(BaraError, match="num_observations"):
        model(x=x)
    model.peft_config["default"].num_observations = 10
    model(x=x)
    first = bara.kl_loss(model)
    model.peft_config["default"].kl_weight = 0.05
    model.peft_config["default"].local_kl_weight = 0.0
    model(x=x)
    terms = bara.kl_terms(model)
    assert bara.kl_loss(model).item() == pytest.approx(0.05 / 10 * terms["kl_global"], rel=1e-5)
    assert first > bara.kl_loss(model)
    model.peft_config["default"].weight_noise = 1.25
    bara.set_progress(model, 0.0, num_steps=1)
    assert layer_posterior(model)[1].weight_noise == 1.25


def test_a_copy_of_a_model_has_numbers_of_its_own():
    model = stir(adapt(TinyNet(), target_modules=["layer"]))
    other = copy.deepcopy(model)
    numbers(other).weight_noise = 0.0
    assert layer_posterior(other)[1].weight_noise == 0.0
    assert layer_posterior(model)[1].weight_noise == 4.0


def test_an_adapter_of_version_0_1_loads(tmp_path):
    """It has the numbers in place of the Nones, options that are gone, and other tensor names."""
    model = stir(adapt(TinyNet(), "balora", target_modules=["layer"])).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text("utf-8"))
    del stored["resolved"]
    path.write_text(json.dumps(stored), "utf-8")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "adapter_model.safetensors")
    names = {"hidden_": "default.network.0.", "output_": "default.network.2."}
    old = {
        re.sub("(?<=lora_posterior.)(hidden_|output_)", lambda part: names[part[0]], key): tensor
        for key, tensor in weights.items()
    }
    assert old.keys() != weights.keys()
    save_file(old, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(0)
    base = TinyNet()
    base.load_state_dict(
        {k.replace("base_layer.", ""): v for k, v in model.base_model.model.state_dict().items()},
        strict=False,
    )
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    x = torch.randn(4, 6)
    with torch.no_grad(), bara.sampling(model, seed=0), bara.sampling(loaded, seed=0):
        torch.testing.assert_close(loaded(x=x)["logits"], model(x=x)["logits"])


@pytest.mark.parametrize(
    ("option", "usual", "other"),
    [("logit_scale", 100.0, 20.0), ("intensity", False, True), ("init_logit", 3.0, 0.0)],
)
def test_options_of_earlier_versions(option, usual, other, tmp_path):
    BaraConfig(target_modules=["layer"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(stored | {option: usual}), "utf-8")
    assert BaraConfig.from_pretrained(tmp_path).target_modules == {"layer"}
    path.write_text(json.dumps(stored | {option: other}), "utf-8")
    with pytest.raises(BaraError, match=f"{option} = {other}"):
        BaraConfig.from_pretrained(tmp_path)


def test_damaged_numbers_are_refused():
    with pytest.raises(BaraError, match="resolved must be numbers among"):
        BaraConfig(target_modules=["layer"], resolved={"kl": 1})


@pytest.mark.parametrize("name", ["resolved", "used_by_draws", "needs"])
def test_what_is_filled_in_is_no_option_of_the_recipe(name):
    recipe = TrainRecipe(model="m", method="bara", method_options={name: "x"})
    with pytest.raises(BaraError, match=name):
        check_recipe(recipe)


def test_a_loaded_adapter_has_the_configuration_that_it_was_given(tmp_path):
    config = BaraConfig(r=4, **TARGETS)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode


def test_the_strength_multiplies_the_kl_and_the_noise(tmp_path):
    """Given or left to the layers; the KL of one draw is linear in it."""
    for options in ({}, {"kl_weight": 0.5, "local_kl_weight": 0.1, "weight_noise": 0.2}):
        kl, noise = {}, {}
        for strength in (1.0, 3.0):
            config = BaraConfig(
                r=4,
                strength=strength,
                num_observations=10,
                warmup=0,
                target_modules=["layer"],
                **options,
            )
            torch.manual_seed(0)
            model = get_peft_model(TinyNet(), config).train()
            model(torch.ones(2, 6))
            kl[strength] = float(bara.kl_loss(model))
            noise[strength] = model.base_model.layer.lora_posterior["default"].weight_noise
            model.save_pretrained(tmp_path)
            again = PeftModel.from_pretrained(TinyNet(), tmp_path)
            layer = again.base_model.layer.lora_posterior["default"]
            assert layer.weight_noise == noise[strength] > 0
        assert kl[3.0] == pytest.approx(3 * kl[1.0], rel=1e-5)
        assert noise[3.0] == pytest.approx(3 * noise[1.0])
    with pytest.raises(bara.BaraError, match="strength must be"):
        BaraConfig(strength=0.0)


@pytest.mark.parametrize(
    ("method", "options", "without"),
    [
        ("mc-dropout", {}, {"kl_weight": 0.5}),
        ("mc-dropout", {}, {"strength": 2.0}),
        ("mc-dropout", {}, {"warmup": 0.2}),
        *((m, {}, {"local_kl_weight": 0.1}) for m in CONFIGS if m != "bara"),
        *(
            (m, {}, {"granularity": "token"})
            for m in CONFIGS
            if m not in ("bara", "balora", "clora")
        ),
        ("bara", {"global_gate": False}, {"global_prior": 0.3}),
        ("bara", {"local_gate": False}, {"local_prior": 0.3}),
        ("bara", {"local_gate": False}, {"init_local_logit": 0.0}),
        ("bara", {"local_gate": False}, {"granularity": "sequence"}),
        ("bara", {"factor_noise": False}, {"noise_prior": 0.5}),
        ("bara", {"factor_noise": False}, {"init_noise": 0.1}),
    ],
)
def test_a_field_that_nothing_reads_is_named(method, options, without, tmp_path):
    (name,) = without
    with pytest.warns(UserWarning, match=f"{name} = .* has no effect"):
        CONFIGS[method](r=4, **options, **without)
    config = CONFIGS[method](r=4, **options)
    assert replace(config) == config  # what was filled in is no choice of the user
    # and an adapter that an earlier version saved with it is still read
    adapt(TinyNet(), method, target_modules=["layer"], **options).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **without}))
    loaded = PeftModel.from_pretrained(TinyNet(), tmp_path)
    assert getattr(loaded.peft_config["default"], name) == without[name]


def test_a_weight_of_nothing_may_be_0():
    assert CONFIGS["mc-dropout"](kl_weight=0, local_kl_weight=0).kl_weight == 0
