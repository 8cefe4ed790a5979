"""Recipes: YAML there and back, names checked, overrides."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import peft
import pytest

from bara import BaraConfig, BaraError
from bara.methods.recipe import TrainRecipe, parse_yaml
from bara.methods.table import METHODS, check_recipe, parse_method


def test_yaml_round_trip(tmp_path: Path) -> None:
    recipe = TrainRecipe(
        model="some/model",
        data="données.csv",
        method="lora",
        method_options={"r": 4, "target_modules": ["query"]},
        training={"learning_rate": 3e-5, "num_train_epochs": 2},
        seed=7,
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), "utf-8")
    assert TrainRecipe.load(path) == recipe
    assert TrainRecipe.load(path).training["learning_rate"] == 3e-5


def test_given_options_go_before_defaults_and_leave_the_others() -> None:
    recipe = TrainRecipe(model="m", training={"num_train_epochs": 3})
    assert recipe.training["num_train_epochs"] == 3
    assert recipe.training["learning_rate"] == 1e-3
    changed = recipe.with_options({"training.learning_rate": 0.5, "seed": 3})
    assert changed.training == {**recipe.training, "learning_rate": 0.5}
    assert (changed.seed, changed.model) == (3, "m")
    assert asdict(recipe) == asdict(TrainRecipe(model="m", training={"num_train_epochs": 3}))


@pytest.mark.parametrize("text", ["1e-3", "1.e-3", "+1E-3", ".1e-2", "1.0e-3", "0.001"])
def test_yaml_numbers_in_scientific_notation_are_numbers(text: str) -> None:
    assert parse_yaml(text) == 1e-3
    assert parse_yaml(f"{{a: {text}}}") == {"a": 1e-3}


def test_yaml_no_is_a_word_and_true_is_not() -> None:
    assert parse_yaml("{save_strategy: no, bf16: true, fp16: false}") == {
        "save_strategy": "no",
        "bf16": True,
        "fp16": False,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: x", r"recipe: there is no 'modle'; did you mean 'model'\?"),
        ("training: [1]", r"training must be a mapping"),
        ("seed: true", r"seed must be a whole number, not True"),
        ("model: 3", r"model must be text, not 3"),
        ("- model", r"must be a mapping"),
        ("model: [", r"is not YAML"),
        ("!!python/object/apply:os.getcwd []", r"is not YAML"),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(BaraError, match=message) as caught:
        TrainRecipe.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("training.learning_rat", 1, r"training: there is no 'learning_rat'; .*'learning_rate'"),
        ("method_options.local_piror", 1, r"'local_piror'; did you mean 'local_prior'"),
        ("method", "bayes", r"method: there is no 'bayes'; known: .*bara"),
        ("training.output_dir", "x", r"set `output` instead of training.output_dir"),
        ("model", "", r"which model"),
    ],
)
def test_unknown_option_names_are_refused_with_the_nearest(
    option: str, value: object, message: str
) -> None:
    recipe = TrainRecipe(model="m").with_options({option: value})
    with pytest.raises(BaraError, match=message):
        check_recipe(recipe)


def test_a_temperature_needs_something_to_fit_it_to() -> None:
    check_recipe(TrainRecipe(model="m", method="lora+temperature", task="multiple-choice"))
    with pytest.raises(BaraError, match="causal-lm does not predict; leave out"):
        check_recipe(TrainRecipe(model="m", method="lora+temperature", task="causal-lm"))


def test_missing_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BaraError, match="cannot read the recipe"):
        TrainRecipe.load(tmp_path / "none.yaml")


def test_methods() -> None:
    assert parse_method("lora")[0].config is peft.LoraConfig
    assert parse_method("BARA+temperature") == (METHODS["bara"], True)
    assert METHODS["bara"].config is BaraConfig
    check_recipe(TrainRecipe(model="m", method="balora"))


def bomb(levels: int) -> str:
    """Lists of lists of ...: 9 ** levels values in a few hundred bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "content",
    [
        bomb(9),
        "method_options: &a {x: *a}",
        "a: 2001-99-99",
        "a: !!timestamp never",
        "a: !!bool maybe",
        "a: !!int ten",
        "a: " + "9" * 5000,
        "a: " + "[" * 5000,
        "? [a]\n: b",
        "a: !!binary ü",
        "a: *unknown",
        "x" * 300_000,
        "\x00",
    ],
)
def test_yaml_of_any_kind_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, "utf-8")
    with pytest.raises(BaraError) as caught:
        check_recipe(TrainRecipe.load(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "there is no" in str(caught.value)


def test_an_alias_that_is_used_twice_is_no_bomb() -> None:
    assert parse_yaml("{a: &x [1, 2], b: *x}") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("training.num_train_epochs", 0, "above 0, not 0"),
        ("training.num_train_epochs", -1, "above 0, not -1"),
        ("training.num_train_epochs", float("nan"), "a finite number, not nan"),
        ("training.num_train_epochs", float("inf"), "a finite number, not inf"),
        ("training.num_train_epochs", "many", "a number, not 'many'"),
        ("training.num_train_epochs", 1e9, "at most 1000000"),
        ("training.learning_rate", 0, "above 0"),
        ("training.learning_rate", -1e-3, "above 0, not -0.001"),
        ("training.learning_rate", float("nan"), "a finite number"),
        ("training.learning_rate", "1e-3", "a number, not '1e-3'"),
        ("training.per_device_train_batch_size", 0, "at least 1, not 0"),
        ("training.per_device_train_batch_size", 2.5, "a whole number, not 2.5"),
        ("training.gradient_accumulation_steps", 0, "at least 1, not 0"),
        ("training.weight_decay", -1, "at least 0"),
        ("training.report_to", "tensorbored", "not 'tensorbored'"),
        ("training.report_to", ["none", "x"], r"not \['none', 'x'\]"),
        ("training.bf16", "yes", "true or false, not 'yes'"),
        ("training.dataloader_num_workers", 10**9, "at most 256"),
        ("method_options.r", 10**9, "at most 65536, not 1000000000"),
        ("method_options.r", 1e9, "a whole number, not 1000000000.0"),
        ("method_options.target_modules", 5, "a list or text, not 5"),
        ("method_options.lora_dropout", "some", "a number, not 'some'"),
        ("method_options.rank_pattern", [1], "a mapping"),
    ],
)
def test_options_out_of_range_are_named(option: str, value: object, message: str) -> None:
    recipe = TrainRecipe(model="m", method="lora").with_options({option: value})
    with pytest.raises(BaraError, match=rf"^{option} must be .*{message}"):
        check_recipe(recipe)
    with pytest.raises(BaraError, match=r"^--typed must be"):
        check_recipe(recipe, {option: "--typed"})


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, 0.5, True, "0"])
def test_seeds_that_numpy_does_not_take_are_refused(seed: object) -> None:
    with pytest.raises(BaraError, match=r"recipe\.seed must be"):
        TrainRecipe(seed=seed)


def test_options_of_earlier_versions_are_unknown_to_a_new_training() -> None:
    recipe = TrainRecipe(model="m", method_options={"logit_scale": 10.0})
    with pytest.raises(BaraError, match="there is no 'logit_scale'"):
        check_recipe(recipe)


def test_what_training_arguments_take_stays_allowed() -> None:
    training = {
        "num_train_epochs": 0.5,
        "learning_rate": 1,
        "warmup_steps": 0,
        "max_steps": 3,
        "eval_steps": None,
        "save_steps": 0.5,
        "report_to": ["tensorboard"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "optim": "adamw_torch",
    }
    options = {"target_modules": {"query"}, "lora_alpha": 12.5, "rank_pattern": {"query": 2}}
    for name, method in METHODS.items():
        if method.by_steps and name not in ("ivon", "laplace"):
            check_recipe(TrainRecipe(model="m", method=name, training=training))
    check_recipe(TrainRecipe(model="m", method="lora", method_options=options))


@pytest.mark.parametrize(
    ("task", "option", "value"),
    [
        (None, "scoring", "letter"),
        ("regression", "stride", 3),
        ("multi-label", "max_answer_length", 3),
        ("causal-lm", "text_column", "body"),
        ("seq2seq", "label_column", "answer"),
        ("multiple-choice", "text_pair_column", "context"),
        ("image-classification", "max_length", 64),
        ("image-classification", "text_column", "body"),
    ],
)
def test_options_that_a_task_has_no_use_for_are_refused(
    task: str | None, option: str, value: object
) -> None:
    recipe = TrainRecipe(model="m", task=task).with_options({option: value})
    with pytest.raises(BaraError, match=rf"^{option} has no use for .*: leave it out"):
        check_recipe(recipe)
    with pytest.raises(BaraError, match=r"^--typed has no use for "):
        check_recipe(TrainRecipe(model="m", task=task), {option: "--typed"})


def test_a_split_of_no_validation_table_is_refused() -> None:
    recipe = TrainRecipe(model="m", validation_split="test")
    with pytest.raises(BaraError, match="validation_split"):
        check_recipe(recipe)
    check_recipe(recipe.with_options({"validation": "hub/name"}))


@pytest.mark.parametrize(
    ("method", "option"),
    [("full", "r"), ("probe", "r"), ("probe", "lora_alpha"), ("pvera", "lora_alpha")],
)
def test_methods_refuse_the_rank_that_they_do_not_have(method: str, option: str) -> None:
    recipe = TrainRecipe(model="m", method=method, method_options={option: 4})
    with pytest.raises(BaraError, match=option):
        check_recipe(recipe)
    with pytest.raises(BaraError, match=r"--rank|lora_alpha"):
        check_recipe(recipe, {"method_options.r": "--rank"})


@pytest.mark.parametrize("option", ["inference_mode", "revision", "base_model_name_or_path"])
def test_fields_that_follow_from_the_recipe_are_no_options(option: str) -> None:
    recipe = TrainRecipe(model="m", method_options={option: True})
    with pytest.raises(BaraError, match=f"there is no '{option}'"):
        check_recipe(recipe)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("kl_weight", -1.0),
        ("global_prior", 3.0),
        ("use_dora", True),
        ("init_lora_weights", "pissa"),
    ],
)
def test_what_the_configuration_refuses_is_refused_before_a_model_is_loaded(
    option: str, value: object
) -> None:
    with pytest.raises(BaraError, match=option):
        check_recipe(TrainRecipe(model="m", method_options={option: value}))


@pytest.mark.parametrize("method", ["probe", "setfit"])
def test_what_a_method_without_steps_does_not_read_is_refused(method: str) -> None:
    if METHODS[method].package:
        pytest.importorskip(METHODS[method].package)
    recipe = TrainRecipe(model="m", method=method)
    check_recipe(recipe)
    with pytest.raises(BaraError, match="label_smoothing_factor"):
        check_recipe(recipe.with_options({"training.label_smoothing_factor": 0.1}))
    held_out = recipe.with_options({"validation": "held-out.jsonl"})
    with pytest.raises(BaraError, match=rf"no use for --validation: .*{method}\+temperature"):
        check_recipe(held_out)
    check_recipe(held_out.with_options({"method": f"{method}+temperature"}))
