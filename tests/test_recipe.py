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
