"""`bara ranks`, `bara prune` and `bara export` end to end, and one line for what goes wrong."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from bara.adapter.layer import adapted_layers
from bara.cli import main
from bara.data.text_task import TextTask
from bara.errors import BaraError
from bara.export.export_lora import export_lora
from bara.finetuning.finetune import build_model
from bara.finetuning.load import load_adapter
from bara.finetuning.save import save_adapter
from bara.methods import set_temperature
from bara.methods.recipe import TrainRecipe
from bara.methods.table import METHODS
from bara.prediction.batches import to_device
from bara.prediction.predict import predict
from bara.prediction.predictive import ClassificationPredictive, RegressionPredictive
from conftest import write_jsonl
from helpers import adapt, stir, tiny_llama

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


def make_adapter(
    tmp_path: Path, model_dir: Path, table: Path, method: str, temperature: float | None = None
) -> Path:
    options = {"r": 3}
    name = f"{method}+temperature" if temperature else method
    recipe = TrainRecipe(model=str(model_dir), method=name, method_options=options)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    task = TextTask.infer(Dataset.from_list(rows))
    torch.manual_seed(0)
    model, tokenizer = build_model(recipe, METHODS[method], task)
    stir(model, 0.1)
    if method == "bara":
        for _, _, posterior in adapted_layers(model, "default"):
            posterior.global_logit.data[:] = torch.tensor([-0.2, 0.04, 0.02])
    if temperature:
        set_temperature(model, temperature)
    save_adapter(tmp_path / name, model, tokenizer, task, recipe)
    return tmp_path / name


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


@pytest.mark.parametrize(("method", "used"), [("lora", None), ("ensemble", 2), ("bara", 4)])
def test_evaluate_writes_the_draws_that_were_used(
    tmp_path: Path,
    tiny_model_dir: Path,
    table: Path,
    run: Callable[..., str],
    method: str,
    used: int | None,
) -> None:
    trained, numbers = tmp_path / "trained", tmp_path / "numbers.json"
    options = ["--set", "method_options={num_members: 2}"] if method == "ensemble" else []
    train = ["--method", method, "--model", tiny_model_dir, "--data", table, "--epochs", 1]
    run("train", *train, "--output", trained, *options)
    run("evaluate", trained, "--data", table, "--num-draws", 4, "--json", numbers)
    assert json.loads(numbers.read_text())["num_draws"] == used


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
    distance = logits(loaded, batch).softmax(-1) - logits(model, batch).softmax(-1)
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
    assert (draws / "client.py").exists()
    manifest = json.loads((draws / "manifest.json").read_text())
    base = tmp_path / "tiny-bert"
    assert (manifest["base_model"], manifest["task"]) == (str(base), "classification")
    assert manifest["label_names"] == ["neg", "pos"]
    assert (manifest["num_draws"], manifest["seed"], manifest["rank"]) == (2, 0, 3)
    assert manifest["difference"]["num_inputs"] == 12


def test_the_documented_mixed_batch_is_the_mean_of_the_draws(
    tmp_path: Path, adapter: Path, table: Path, run: Callable[..., str]
) -> None:
    """The code of docs/ranks-and-export.md, without `bara`, against the draws one at a time."""
    ensemble = tmp_path / "ensemble"
    run("export", adapter, "--mode", "draws", "-n", 3, "--data", table, "--output", ensemble)
    page = (Path(__file__).parent.parent / "docs/ranks-and-export.md").read_text("utf-8")
    code = page.partition("PEFT's mixed batches")[2].partition("```python")[2].partition("```")[0]
    code = f"import sys\nsys.modules['bara'] = None\n{code}"
    code += "torch.save((texts, probs, epistemic), 'found.pt')"
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    texts, probs, epistemic = torch.load(tmp_path / "found.pt")
    draws = []
    for number in range(3):
        model, tokenizer, _ = load_adapter(ensemble / f"draw-{number}")
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        draws.append(logits(model, batch).softmax(-1))
    torch.testing.assert_close(probs, sum(draws) / 3, atol=1e-6, rtol=1e-5)
    assert (epistemic > 0).all()
    assert not torch.allclose(draws[0], draws[1])


def logits(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**to_device(batch, model.device)).logits.cpu()


@pytest.mark.parametrize("mode", ["mean", "draws", "merged"])
def test_a_temperature_is_folded_into_the_exported_head(
    tmp_path: Path, tiny_model_dir: Path, table: Path, run: Callable[..., str], mode: str
) -> None:
    """Against the export of the same weights without a temperature, both read by PEFT alone."""
    temperature = 2.5
    plain = make_adapter(tmp_path, tiny_model_dir, table, "bara")
    tempered = make_adapter(tmp_path, tiny_model_dir, table, "bara", temperature)
    options = ["--data", table, "--mode", mode, *(["-n", 2] if mode == "draws" else [])]
    found = []
    shown = []
    for adapter, out in ((plain, tmp_path / "p"), (tempered, tmp_path / "t")):
        shown.append(run("export", adapter, *options, "--output", out))
        folder = out / "draw-1" if mode == "draws" else out
        if mode == "merged":
            model = AutoModelForSequenceClassification.from_pretrained(folder)
            assert "temperature" not in (folder / "config.json").read_text()
        else:
            base = AutoModelForSequenceClassification.from_pretrained(
                tiny_model_dir, num_labels=2, ignore_mismatched_sizes=True
            )
            model = PeftModel.from_pretrained(base, folder)
            assert "+temperature" not in (folder / "recipe.yaml").read_text()
            run("evaluate", folder, "--data", table)
        ids = torch.tensor([[2, 9, 12, 3], [2, 15, 20, 3]])
        found.append(logits(model.eval(), {"input_ids": ids}))
    torch.testing.assert_close(found[1], found[0] / temperature, atol=1e-6, rtol=1e-5)
    assert found[0].abs().max() > 0.1
    # the distance is that of two tempered predictions: had one kept its logits, it would be larger
    distances = [float(text.split("mean ")[-1].split(",")[0]) for text in shown]
    assert distances[1] < distances[0]


def test_a_regression_s_temperature_is_folded_into_its_variance(
    tmp_path: Path, tiny_model_dir: Path, run: Callable[..., str]
) -> None:
    rows = [{"text": f"the film is {word}", "label": i / 2} for i, word in enumerate(WORDS)]
    table = write_jsonl(tmp_path / "regression.jsonl", rows)
    adapter = make_adapter(tmp_path, tiny_model_dir, table, "balora", 3.0)
    run("export", adapter, "--output", tmp_path / "out")
    batch = {"input_ids": torch.tensor([[2, 9, 12, 3], [2, 15, 20, 3]])}
    before, after = (
        predict(load_adapter(folder)[0], batch, deterministic=True)
        for folder in (adapter, tmp_path / "out")
    )
    assert isinstance(before, RegressionPredictive)
    assert isinstance(after, RegressionPredictive)
    torch.testing.assert_close(after.mean, before.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.variance_draws, before.variance_draws, atol=0, rtol=1e-4)


def test_pruning_keeps_the_temperature(
    tmp_path: Path, tiny_model_dir: Path, table: Path, run: Callable[..., str]
) -> None:
    adapters = [make_adapter(tmp_path, tiny_model_dir, table, "bara", t) for t in (None, 2.5)]
    batch = {"input_ids": torch.tensor([[2, 9, 12, 3], [2, 15, 20, 3]])}
    found = []
    for adapter in adapters:
        out = adapter.with_name(f"{adapter.name}-pruned")
        run("prune", adapter, "--data", table, "--output", out, "--num-draws", 2)
        run("evaluate", out, "--data", table)
        found.append(predict(load_adapter(out)[0], batch, deterministic=True))
    assert isinstance(found[0], ClassificationPredictive)
    plain, tempered = (part.log_probs_draws for part in found)
    torch.testing.assert_close(tempered, (plain / 2.5).log_softmax(-1), atol=1e-6, rtol=1e-5)


def test_a_temperature_without_a_trained_head_is_refused(
    tmp_path: Path, tiny_bert: torch.nn.Module
) -> None:
    model = adapt(tiny_bert, "balora")
    set_temperature(model, 2.0)
    with pytest.raises(BaraError, match=r"temperature 2 .* cannot be folded"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    set_temperature(model, 1.0)
    export_lora(model, tmp_path / "out")


def test_a_language_models_temperature_is_not_in_its_weights(tmp_path: Path) -> None:
    """It divides the scores of choices."""
    model = adapt(tiny_llama(), "balora", task_type="CAUSAL_LM")
    export_lora(model, tmp_path / "plain")
    set_temperature(model, 2.0)
    export_lora(model, tmp_path / "tempered")
    plain, tempered = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "tempered")
    )
    assert plain.keys() == tempered.keys()
    assert all(torch.equal(plain[name], tempered[name]) for name in plain)


def test_force_replaces_the_draws_of_an_earlier_export(
    tmp_path: Path, adapter: Path, table: Path, run: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    options = ["--data", table, "--output", out, "--force"]
    run("export", adapter, "--mode", "draws", "-n", 3, *options)
    (out / "draw-mine").mkdir()
    (out / "draw-2" / "old").touch()
    run("export", adapter, "--mode", "draws", "-n", 2, *options)
    names = {path.name for path in out.iterdir()}
    assert names == {"README.md", "client.py", "draw-0", "draw-1", "draw-mine", "manifest.json"}
    run("export", adapter, *options)
    assert not {"draw-0", "draw-1", "manifest.json"} & {path.name for path in out.iterdir()}
    assert (out / "draw-mine").is_dir()


@pytest.mark.parametrize("command", ["export", "prune"])
def test_an_interruption_leaves_nothing(
    tmp_path: Path,
    adapter: Path,
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    options = ["--data", str(table), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(TextTask, "save", interrupted)
    assert main([command, str(adapter), *options]) != 0
    assert set(tmp_path.iterdir()) == before


def test_names_are_once_in_an_exported_config(
    tmp_path: Path, adapter: Path, table: Path, run: Callable[..., str]
) -> None:
    for command in ("export", "prune"):
        run(command, adapter, "--data", table, "--output", tmp_path / command)
        config = json.loads((tmp_path / command / "adapter_config.json").read_text())
        assert sorted(config["modules_to_save"]) == ["classifier", "score"]


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

    assert "method is LORA" in failing("ranks", lora, *data, *out)
    assert "method is LORA" in failing("prune", lora, *data, *out)
    assert "method is LORA" in failing("export", lora, *out)
    balora = make_adapter(tmp_path, tiny_model_dir, table, "balora")
    assert "method is BALORA" in failing("prune", balora, *data, *out)

    for folder, hint in (("draw-0", "give one of its draws"), (".", "it holds a whole model")):
        (tmp_path / "other" / folder).mkdir(parents=True, exist_ok=True)
        name = "config.json" if folder == "." else "adapter_config.json"
        (tmp_path / "other" / folder / name).write_text("{}")
        assert hint in failing("evaluate", tmp_path / "other", *data)
        shutil.rmtree(tmp_path / "other")
    for command in ("ranks", "prune", "export"):
        assert "is empty" in failing(command, adapter, "--data", empty, *out)
    for option in ("--num-draws", "--seed"):
        assert option in failing("export", adapter, *data, *out, option, 2)
    for option in (["--patterns"], ["--server", "vllm"]):
        merged = failing("export", adapter, *data, *out, "--mode", "merged", *option)
        assert f"{option[0]} is for adapters" in merged
    assert "give two at least" in failing("export", adapter, "--data", one, *out)
    assert "give calibration inputs" in failing("export", adapter, *out)
    assert "give calibration inputs" in failing("export", balora, "--mode", "draws", *out)
    assert "give --data too" in failing("export", adapter, "--held-out", table, *out)

    for threshold in ("1.5", "-0.1", "nan"):
        line = failing("prune", adapter, *data, *out, "--threshold", threshold)
        assert "threshold must be in [0, 1]" in line
    line = failing("prune", adapter, *data, *out, "--threshold", 0)
    assert "nothing to prune: the lowest inclusion is 0.000, the threshold 0 (--threshold)" in line
    assert "--tolerance" in failing("prune", adapter, *data, *out, "--tolerance", -1)
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
