"""Every method by name: trained, saved, loaded and predicted with through one interface."""

import runpy
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification

import bara
from bara.draws.draws import draw_source
from bara.errors import BaraError
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.methods.ensemble import member_name
from bara.methods.recipe import TrainRecipe
from bara.methods.table import METHODS, check_recipe, parse_method
from conftest import tiny_bert_config

TEXTS = [
    ("the film was great", "good"),
    ("a fine plot and warm", "good"),
    ("the food was awful", "bad"),
    ("not good , poor !", "bad"),
]
TABLE = Dataset.from_list([{"text": text, "label": label} for text, label in TEXTS * 4])
TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "save_strategy": "no"}
OPTIONS = {"ensemble": {"num_members": 2}, "setfit": {"num_iterations": 1}}
ONE_DRAW = {"lora", "full", "adalora", "monteclora", "setfit"}
BY_BATCH = {"pvera"}  # draws that depend on the batch, as PEFT has them
PACKAGES = {"ivon": "ivon", "laplace": "laplace", "setfit": "setfit"}


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    BertForSequenceClassification(tiny_bert_config(num_labels=2)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def train(base_dir, output, method, *, validation=TABLE, training=None, seed=0, **options):
    known, _ = parse_method(method)
    by_steps = {"learning_rate": 0.02, **TRAINING} if known.by_steps else {}
    rank = {"r": 4} if known.knows("r") else {}
    recipe = TrainRecipe(
        model=str(base_dir),
        output=str(output),
        method=method,
        method_options={**rank, **OPTIONS.get(method.partition("+")[0], {}), **options},
        training={**by_steps, **(training or {})},
        seed=seed,
    )
    return finetune(recipe, TABLE, validation)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_trains_saves_loads_and_predicts(base_dir, tmp_path, monkeypatch, method):
    if method in PACKAGES:
        pytest.importorskip(PACKAGES[method])
    before = {}

    def save(folder, model, tokenizer, task, recipe):
        inputs = task.inputs(TABLE, tokenizer)
        before["draws"] = bara.predict(model, inputs, num_draws=3, seed=1).log_probs_draws
        return save_adapter(folder, model, tokenizer, task, recipe)

    from bara.finetuning.save import save_adapter

    monkeypatch.setattr("bara.finetuning.finetune.save_adapter", save)
    folder = train(base_dir, tmp_path / "out", f"{method}+temperature")
    model, tokenizer, task = load_adapter(folder)
    inputs = task.inputs(TABLE, tokenizer)
    after = bara.predict(model, inputs, num_draws=3, seed=1)
    torch.testing.assert_close(after.log_probs_draws, before["draws"], atol=1e-5, rtol=1e-5)
    if method not in BY_BATCH:
        small = bara.predict(model, inputs, num_draws=3, seed=1, batch_size=5)
        torch.testing.assert_close(
            small.log_probs_draws, after.log_probs_draws, atol=1e-5, rtol=1e-5
        )
    mean = bara.predict(model, inputs, deterministic=True)
    assert mean.num_draws == 1
    if method in ONE_DRAW:
        assert after.num_draws == 1
    else:
        assert after.num_draws == (2 if method == "ensemble" else 3)
        assert not torch.equal(after.log_probs_draws[0], after.log_probs_draws[1])
    again = bara.predict(model, inputs, deterministic=True)
    torch.testing.assert_close(again.log_probs_draws, mean.log_probs_draws, atol=0, rtol=0)


@pytest.fixture(scope="module")
def ensemble_dir(base_dir, tmp_path_factory):
    training = {"save_strategy": "epoch"}
    return train(base_dir, tmp_path_factory.mktemp("ensemble"), "ensemble", training=training)


def test_an_ensemble_is_its_members_on_one_base(base_dir, ensemble_dir, tmp_path):
    model, tokenizer, task = load_adapter(ensemble_dir)
    inputs = task.inputs(TABLE, tokenizer)
    together = bara.predict(model, inputs).log_probs_draws
    lora, _, _ = load_adapter(train(base_dir, tmp_path / "lora", "lora"))
    alone = bara.predict(lora, inputs).log_probs_draws[0]
    torch.testing.assert_close(together[0], alone, atol=1e-5, rtol=1e-5)

    def frozen(model):
        names = ("lora_", "modules_to_save")
        return sum(p.numel() for n, p in model.named_parameters() if not any(k in n for k in names))

    assert frozen(model) == frozen(lora)  # one base for all members
    for index in range(2):
        model.set_adapter(member_name(index))
        with torch.no_grad():
            batch = tokenizer([text for text, _ in TEXTS], padding=True, return_tensors="pt")
            expected = model(**batch.to(model.device)).logits.log_softmax(-1).cpu()
        torch.testing.assert_close(together[index, :4], expected, atol=1e-5, rtol=1e-5)


def test_members_write_no_checkpoints(ensemble_dir):
    assert not list((ensemble_dir / "checkpoints").glob("checkpoint-*"))


def test_adalora_is_not_resumed(base_dir, tmp_path):
    """Its checkpoints have lost the ranks that were cut off."""
    output = train(base_dir, tmp_path / "out", "adalora", training={"save_strategy": "epoch"})
    weights = (output / "adapter_model.safetensors").read_bytes()
    recipe = TrainRecipe.load(output / "recipe.yaml")
    with pytest.raises(BaraError, match=r"method adalora lack what.*\(--overwrite\)"):
        finetune(recipe, TABLE, TABLE, resume=True)
    assert (output / "adapter_model.safetensors").read_bytes() == weights


def test_a_missing_member_is_an_error(ensemble_dir, tmp_path):
    folder = shutil.copytree(ensemble_dir, tmp_path / "copy")
    (folder / "member-1" / "adapter_model.safetensors").unlink()
    with pytest.raises(BaraError, match="member-1"):
        load_adapter(folder)


def test_temperature_needs_held_out_data(base_dir, tmp_path):
    with pytest.raises(BaraError, match="needs held-out data"):
        train(base_dir, tmp_path / "out", "lora+temperature", validation=None)


def test_an_earlier_methods_files_are_not_read(base_dir, tmp_path):
    """A folder keeps what the new method does not replace; it must not have a say."""
    train(base_dir, tmp_path / "out", "bara+temperature")
    recipe = TrainRecipe(
        model=str(base_dir), output=str(tmp_path / "out"), method="lora", training=TRAINING
    )
    model, _, _ = load_adapter(finetune(recipe, TABLE, TABLE, overwrite=True))
    assert draw_source(model) is None
    assert not hasattr(model.config, "predictive_temperature")


def test_the_draws_of_a_model_without_a_posterior_are_refused(tiny_bert):
    with pytest.raises(BaraError, match="nothing to draw from"), bara.sampling(tiny_bert):
        pass


@pytest.mark.parametrize(
    ("method", "task"),
    [("laplace", "causal-lm"), ("laplace", "regression"), ("tfb", "multiple-choice")],
)
def test_a_task_that_the_method_is_not_for_is_refused_before_training(tmp_path, method, task):
    if method in PACKAGES:
        pytest.importorskip(PACKAGES[method])
    table = Dataset.from_dict({"text": ["a", "b"], "label": [0.5, 1.5]})
    # the model does not exist: the refusal comes before it is loaded
    recipe = TrainRecipe(model="none", output=str(tmp_path), method=method, task=task)
    with pytest.raises(BaraError, match=f"this is for classification.*not {task}"):
        finetune(recipe, table)


def test_names():
    assert parse_method("BaRA+temperature") == (METHODS["bara"], True)
    with pytest.raises(BaraError, match="there is no 'blobb'; did you mean 'blob'"):
        parse_method("blobb+temperature")
    with pytest.raises(BaraError, match="num_members must be an integer >= 1, not 0"):
        check_recipe(TrainRecipe(model="m", method="ensemble", method_options={"num_members": 0}))
    with pytest.raises(BaraError, match="there is no 'num_members'"):
        check_recipe(TrainRecipe(model="m", method="lora", method_options={"num_members": 2}))


def test_defaults_follow_the_method():
    recipe = TrainRecipe().with_options({"method": "full"})
    assert recipe.training["learning_rate"] == 5e-5
    assert recipe.method_options == {}
    given = TrainRecipe(training={"learning_rate": 0.5}).with_options({"method": "full"})
    assert given.training["learning_rate"] == 0.5


def test_the_table_of_methods_in_the_docs_is_that_of_the_registrations():
    script = Path(__file__).parents[1] / "scripts" / "methods_table.py"
    names = runpy.run_path(str(script))
    text = names["PAGE"].read_text("utf-8")
    assert names["page"](text) == text
    assert all(f"| `{name}` |" in text for name in METHODS)
