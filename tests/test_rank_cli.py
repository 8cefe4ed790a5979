"""`bara ranks`, `bara prune` and `bara export` end to end, and one line for what goes wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from bara.data import TextTask
from bara.finetune import build_model, save_adapter
from bara.loading import load_adapter
from bara.methods import METHODS
from bara.recipe import TrainRecipe
from bara.tuner import adapted_layers
from conftest import write_jsonl
from helpers import stir

WORDS = ("good", "great", "fine", "bad", "awful", "poor")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        {"text": f"the {noun} is {word}", "label": "pos" if i < 3 else "neg"}
        for i, word in enumerate(WORDS)
        for noun in ("film", "plot , it was")
    ]
    return write_jsonl(tmp_path / "table.jsonl", rows)


@pytest.fixture
def adapter(tmp_path: Path, tiny_model_dir: Path, table: Path) -> Path:
    """An adapter as `bara train` saves it, with random weights and one unused factor a layer."""
    return make_adapter(tmp_path, tiny_model_dir, table, "bara")


def make_adapter(tmp_path: Path, model_dir: Path, table: Path, method: str) -> Path:
    options = {"r": 3} | ({"logit_scale": 20.0} if method == "bara" else {})  # as helpers.adapt
    recipe = TrainRecipe(model=str(model_dir), method=method, method_options=options)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    task = TextTask.infer(Dataset.from_list(rows))
    torch.manual_seed(0)
    model, tokenizer = build_model(recipe, METHODS[method], task)
    stir(model, 0.1)
    if method == "bara":
        for _, _, posterior in adapted_layers(model, "default"):
            posterior.global_logit.data[:] = torch.tensor([-1.0, 0.2, 0.1])
    save_adapter(tmp_path / method, model, tokenizer, task, recipe)
    return tmp_path / method


def test_ranks(tmp_path: Path, adapter: Path, table: Path, run: Callable[..., str]) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "a warm film"}, {"text": "cold !"}])
    options = ["--data", table, "--against", other, "--num-draws", 3, "--output", tmp_path / "out"]
    shown = run("ranks", adapter, *options)
    numbers = json.loads((tmp_path / "out" / "ranks.json").read_text())
    assert f"s_bar = {numbers['s_bar']:.2f}" in shown
    for module in ("query", "key", "value"):
        assert module in shown
    assert numbers["shift"]["data"] == "other.jsonl"
    assert len(numbers["per_input"]["soft"]) == 12
    assert numbers["spearman"] is not None
    card = (adapter / "README.md").read_text()
    assert f"s_bar = {numbers['s_bar']:.2f}" in card
    run("ranks", adapter, "--data", other, "--num-draws", 0, "--output", tmp_path / "unlabelled")
    assert not (tmp_path / "unlabelled" / "error.png").exists()


def test_evaluate_writes_the_card(
    tmp_path: Path, adapter: Path, table: Path, run: Callable[..., str]
) -> None:
    run("evaluate", adapter, "--data", table, "--num-draws", 2, "--json", tmp_path / "n.json")
    metrics = json.loads((tmp_path / "n.json").read_text())["metrics"]
    card = (adapter / "README.md").read_text()
    assert f"| ece | {metrics['ece']:.4f} |" in card
    assert "2 posterior draws" in card


def test_a_method_without_draws_has_none_in_its_card(
    tmp_path: Path, tiny_model_dir: Path, table: Path, run: Callable[..., str]
) -> None:
    lora = make_adapter(tmp_path, tiny_model_dir, table, "lora")
    assert "no draws" in run("evaluate", lora, "--data", table)
    card = (lora / "README.md").read_text()
    assert "## Calibration metrics" in card
    assert "posterior draws" not in card


def test_prune_then_export(
    tmp_path: Path, adapter: Path, table: Path, tiny_model_dir: Path, run: Callable[..., str]
) -> None:
    pruned, plain = tmp_path / "pruned", tmp_path / "plain"
    shown = run("prune", adapter, "--data", table, "--output", pruned, "--num-draws", 2)
    assert "6 of 18 factors removed" in shown
    for word in ("parameters", "bytes", "milliseconds", "change of the mean"):
        assert word in shown
    numbers = json.loads((pruned / "pruning.json").read_text())
    assert numbers["removed"] == 6
    assert numbers["change"]["mean"]["num_inputs"] == 6
    model, tokenizer, _ = load_adapter(pruned)
    assert {layer.r["default"] for _, layer, _ in adapted_layers(model, "default")} == {2}

    shown = run("export", pruned, "--data", table, "--output", plain)
    assert "Distance to the original on 6 held-out texts" in shown
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_dir, num_labels=2, ignore_mismatched_sizes=True
    )
    loaded = PeftModel.from_pretrained(base, plain).eval()
    batch = tokenizer(["the film is good", "cold"], padding=True, return_tensors="pt")
    with torch.no_grad():
        distance = loaded(**batch).logits.softmax(-1) - model(**batch).logits.softmax(-1)
    assert distance.abs().max() < 0.02
    run("evaluate", plain, "--data", table)  # an adapter like any that `bara train` makes


def test_export_draws_and_merged(
    tmp_path: Path, adapter: Path, table: Path, run: Callable[..., str]
) -> None:
    draws, merged = tmp_path / "draws", tmp_path / "merged"
    options = ["--data", table, "--held-out", table]
    run("export", adapter, "--mode", "draws", "-n", 2, *options, "--output", draws)
    assert json.loads((draws / "manifest.json").read_text())["adapters"] == ["draw-0", "draw-1"]
    run("evaluate", draws / "draw-1", "--data", table)
    run("export", adapter, "--mode", "merged", *options, "--output", merged)
    assert AutoModelForSequenceClassification.from_pretrained(merged).config.num_labels == 2
    assert (merged / "tokenizer.json").exists()


def test_one_line_for_what_goes_wrong(
    tmp_path: Path,
    adapter: Path,
    table: Path,
    tiny_model_dir: Path,
    failing: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora = make_adapter(tmp_path, tiny_model_dir, table, "lora")
    out = ["--output", tmp_path / "out"]
    data = ["--data", table]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "the film"}])

    assert "no Bayesian adapter" in failing("ranks", lora, *data, *out)
    assert "method is LORA" in failing("prune", lora, *data, *out)
    assert "method is LORA" in failing("export", lora, *out)
    balora = make_adapter(tmp_path, tiny_model_dir, table, "balora")
    assert "method is BALORA" in failing("prune", balora, *data, *out)

    for command in ("ranks", "prune", "export"):
        assert "is empty" in failing(command, adapter, "--data", empty, *out)
    assert "give two at least" in failing("export", adapter, "--data", one, *out)
    assert "give calibration inputs" in failing("export", adapter, *out)
    assert "give calibration inputs" in failing("export", balora, "--mode", "draws", *out)
    assert "give --data too" in failing("export", adapter, "--held-out", table, *out)

    for threshold in ("1.5", "-0.1", "nan"):
        line = failing("prune", adapter, *data, *out, "--threshold", threshold)
        assert "threshold must be in [0, 1]" in line
    assert "would remove every factor" in failing("prune", adapter, *data, *out, "--threshold", 1)
    strict = ["--threshold", 0.99, "--tolerance", 0]
    assert "more than the tolerance" in failing("prune", adapter, *data, *out, *strict)
    assert "mode must be one of" in failing("export", adapter, *data, *out, "--mode", "best")

    with monkeypatch.context() as patch:
        usage = shutil.disk_usage("/")._replace(free=1000)
        patch.setattr("shutil.disk_usage", lambda path: usage)
        many = ["--mode", "draws", "-n", 100]
        assert "100 adapters would take" in failing("export", adapter, *data, *out, *many)
    assert not (tmp_path / "out").exists()

    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    for command in ("ranks", "prune", "export"):
        assert "--force" in failing(command, adapter, *data, "--output", full)
        assert "is a file" in failing(command, adapter, *data, "--output", table)
    assert "is the adapter itself" in failing("prune", adapter, *data, "--output", adapter)
    assert [path.name for path in full.iterdir()] == ["mine"]


def test_force_replaces_files_and_keeps_others(
    tmp_path: Path, adapter: Path, table: Path, run: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    options = ["--data", table, "--output", out, "--force"]
    run("export", adapter, *options)
    run("ranks", adapter, *options)
    assert (out / "mine").read_text() == "mine"
    assert (out / "report.html").exists()
