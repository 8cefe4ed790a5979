"""Files of an adapter's folder that were changed or lost: one line that names file and field."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import bara
from bara import BaraError, load_adapter
from bara.data.tables import load_table
from bara.data.text_task import TextTask
from bara.finetuning.checkpoints import CHECKPOINTS, newest_checkpoint, only_run
from bara.finetuning.finetune import finetune
from bara.finetuning.task_inputs import predict_table
from bara.methods.recipe import TrainRecipe
from bara.methods.table import METHODS
from test_cli import base_and_table


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A trained adapter with a temperature and checkpoints, and its table."""
    folder = tmp_path_factory.mktemp("whole")
    table = base_and_table(folder, tiny_tokenizer)
    recipe = TrainRecipe(
        model=str(folder / "base"),
        data=str(table),
        validation=str(table),
        output=str(folder / "adapter"),
        method="bara+temperature",
        training={"num_train_epochs": 2},
    )
    finetune(recipe)
    return folder


@pytest.fixture
def adapter(whole: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that may be spoiled."""
    shutil.copytree(whole / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def change(path: Path, **fields: object) -> None:
    """Changes fields of a JSON file; numbers that JSON does not have are written as they are."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **fields}).replace('"1e999"', "1e999"))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("temperature.json", {"temperature": -1}, "temperature must be above 0, not -1"),
        ("temperature.json", {"temperature": 0}, "temperature must be above 0"),
        ("temperature.json", {"temperature": "1e999"}, "temperature must be a finite number"),
        ("temperature.json", {"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ("temperature.json", {"temperature": None}, "temperature must be a number, not None"),
        ("temperature.json", {"unit": "K"}, "unit is not a field that this version knows"),
        (
            "text_task.json",
            {"task": "ranking"},
            "task must be classification, regression, multi-label",
        ),
        ("text_task.json", {"task": ["ranking"]}, "task must be classification"),
        ("text_task.json", {"target_std": 0}, "target_std must be at least 1e-15, not 0"),
        ("text_task.json", {"target_std": 1e100}, "target_std must be at most 1e"),
        ("text_task.json", {"target_mean": "1e999"}, "target_mean must be a finite number"),
        ("text_task.json", {"label_names": "negpos"}, "label_names must be a list, not 'negpos'"),
        ("text_task.json", {"label_names": ["a", 1]}, "label_names must be text"),
        ("text_task.json", {"label_names": []}, "label_names must be 2 classes or more"),
        ("text_task.json", {"label_names": ["a", "b", "a"]}, "label_names has a class twice"),
        ("text_task.json", {"max_length": 12.5}, "max_length must be a whole number, not 12.5"),
        ("text_task.json", {"max_length": 0}, "max_length must be at least 1"),
        ("text_task.json", {"max_length": True}, "max_length must be a whole number"),
        ("text_task.json", {"text_column": None}, "text_column must be text, not None"),
        ("text_task.json", {"text_colum": "x"}, "text_colum is not a field that this version"),
        ("adapter_config.json", {"new_in_peft": 1}, "new_in_peft is not a field that this version"),
        ("adapter_config.json", {"globl_prior": 0.1}, "globl_prior is not a field"),
        ("adapter_config.json", {"r": "8"}, "r must be a whole number, not '8'"),
        ("adapter_config.json", {"kl_weight": [1]}, "kl_weight must be a number"),
        ("adapter_config.json", {"target_modules": 3}, "target_modules must be a list or text"),
        ("adapter_config.json", {"peft_type": "NEXT"}, "peft_type names no method known here"),
        ("adapter_config.json", {"peft_type": [1]}, "peft_type names no method known here"),
    ],
)
def test_a_field_that_does_not_fit_is_named(
    adapter: Path, name: str, fields: dict[str, object], message: str
) -> None:
    change(adapter / name, **fields)
    with pytest.raises(BaraError) as caught:
        load_adapter(adapter)
    assert f"{adapter / name}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["temperature.json", "text_task.json", "adapter_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"\xff\xfe", b"[" * 10**5, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_file_that_holds_something_else_is_named(
    adapter: Path, name: str, content: bytes
) -> None:
    (adapter / name).write_bytes(content)
    with pytest.raises(BaraError) as caught:
        load_adapter(adapter)
    assert str(adapter / name) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_without_any_one_file_the_predictions_stay_or_the_file_is_named(
    whole: Path, adapter: Path
) -> None:
    """`tokenizer.json` for one: without it every word would be unknown."""
    table = load_table(whole / "table.jsonl")

    def probs() -> torch.Tensor:
        model, tokenizer, task = load_adapter(adapter)
        return predict_table(model, tokenizer, task, table, num_draws=2, progress=False).probs

    expected = probs()
    named = set()
    for path in sorted(p for p in adapter.iterdir() if p.is_file()):
        hidden = path.rename(adapter.parent / path.name)
        try:
            assert torch.equal(probs(), expected), path.name
        except BaraError as error:
            named.add(path.name if path.name in str(error) else str(error))
        hidden.rename(path)
    assert named <= {path.name for path in adapter.iterdir()}
    assert "tokenizer.json" in named
    assert "temperature.json" in named


def test_retired_fields_of_the_class_are_read(adapter: Path, monkeypatch) -> None:
    change(adapter / "adapter_config.json", once=3)
    monkeypatch.setattr(METHODS["bara"].config, "RETIRED", {"once": "gone"}, raising=False)
    from bara.cards import adapter_files

    adapter_files._config_schema.cache_clear()
    try:
        adapter_files.check_config(adapter / "adapter_config.json", METHODS["bara"].config)
    finally:
        adapter_files._config_schema.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "adapter_model.safetensors",
    ],
)
def test_a_checkpoint_that_lost_a_file_is_not_resumed(
    whole: Path, adapter: Path, name: str, failing
) -> None:
    resume = ["train", "--resume", "--output", adapter]
    file = newest_checkpoint(adapter / CHECKPOINTS) / name
    content = file.read_bytes()
    file.unlink()
    assert name in failing(*resume)
    if not name.endswith("safetensors"):
        file.write_bytes(content[: len(content) // 2])
        assert name in failing(*resume)


def test_checkpoints_with_bad_names_are_no_checkpoints(adapter: Path) -> None:
    expected = newest_checkpoint(adapter / CHECKPOINTS)
    for name in ("checkpoint-last", "checkpoint-", "checkpoint-9-copy", f"checkpoint-{'9' * 5000}"):
        try:
            (adapter / CHECKPOINTS / name).mkdir()
        except OSError:  # too long for this file system
            continue
        (adapter / CHECKPOINTS / name / "complete").touch()
    assert newest_checkpoint(adapter / CHECKPOINTS) == expected


def test_a_second_training_is_refused_while_the_first_runs(
    whole: Path, tmp_path: Path, failing
) -> None:
    output = tmp_path / "out"
    seen = []

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not seen:
                second = ["train", "--model", whole / "base", "--data", whole / "table.jsonl"]
                seen.append(failing(*second, "--output", output, "--overwrite"))

    recipe = TrainRecipe(
        model=str(whole / "base"),
        data=str(whole / "table.jsonl"),
        output=str(output),
        training={"num_train_epochs": 1},
    )
    finetune(recipe, callbacks=[Second()])
    assert "another `bara train` is writing to" in seen[0]
    assert "--output" in seen[0]
    load_adapter(output)
    with only_run(output):  # the lock went with the run
        pass


def test_an_adapter_for_tasks_of_this_version_still_loads_from_its_own_file(tmp_path: Path) -> None:
    task = TextTask("a", "b", "c", "regression", max_length=7, target_mean=-3.5, target_std=2.0)
    task.save(tmp_path / "text_task.json")
    assert TextTask.load(tmp_path / "text_task.json") == task


@pytest.mark.parametrize("method", ["bara", "balora"])
def test_a_folder_of_version_0_1_loads_with_the_same_draws(
    tmp_path: Path, tiny_model_dir: Path, method: str
) -> None:
    """It has the adapter's name inside of keys, other names for BaLoRA's network, no `resolved`."""
    table = Dataset.from_dict({"text": ["good film", "bad plot"] * 4, "label": ["+", "-"] * 4})
    training = {"learning_rate": 0.01, "use_cpu": True, "save_strategy": "no"}
    recipe = TrainRecipe(
        model=str(tiny_model_dir),
        output=str(tmp_path / "out"),
        method=method,
        training=training,
    )
    folder = finetune(recipe, table)
    now = bara.load_adapter(folder, device="cpu")

    def drawn(loaded: Any) -> torch.Tensor:
        model, tokenizer, task = loaded
        options = {"num_draws": 3, "progress": False}
        return predict_table(model, tokenizer, task, table, **options).log_probs_draws

    expected = drawn(now)
    weights = load_file(folder / "adapter_model.safetensors")
    names = {"hidden_": "network.0.", "output_": "network.2."}
    old = {
        re.sub(
            r"(?<=lora_posterior\.)(hidden_|output_)",
            lambda part: f"default.{names[part[0]]}",
            key,
        ): tensor
        for key, tensor in weights.items()
    }
    assert any("lora_posterior.default." in name for name in old) == (method == "balora")
    save_file(old, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    stored = json.loads(path.read_text("utf-8"))
    stored |= {k: v for k, v in stored.pop("resolved").items() if k in stored}
    for name in ("used_by_draws", "needs"):
        del stored[name]
    path.write_text(json.dumps(stored), "utf-8")
    torch.testing.assert_close(drawn(bara.load_adapter(folder, device="cpu")), expected)
