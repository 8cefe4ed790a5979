"""How commands end, what their errors call an option, and what tells the time left."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from bara.cli.options import probability
from bara.cli.terminal import row_count, say_next
from bara.finetuning.finetune import finetune
from bara.finetuning.predict_dataset import predict_dataset
from bara.methods.recipe import TrainRecipe
from bara.prediction.batches import progress_bar
from conftest import next_commands, write_jsonl


@pytest.fixture
def table(tmp_path):
    rows = [
        {"text": f"the film {i} is {word}", "label": word}
        for i in range(8)
        for word in ("good", "bad")
    ]
    return write_jsonl(tmp_path / "a table.jsonl", rows)


@pytest.fixture
def adapter(tmp_path, tiny_model_dir, table):
    recipe = TrainRecipe(
        model=str(tiny_model_dir),
        data=str(table),
        output=str(tmp_path / "my adapter"),
        training={"max_steps": 1},
    )
    return finetune(recipe)


def test_commands_end_with_one_that_runs(adapter, table, tmp_path, run):
    """A folder with a space in its name, too; capitals are filled in as a user would."""
    (after_evaluate,) = next_commands(run("evaluate", adapter, "--data", table))
    assert after_evaluate == ["predict", str(adapter), "--data", "TABLE"]
    assert len(run(*after_evaluate[:-1], table).splitlines()) == 16
    ranked = run("ranks", adapter, "--data", table, "--output", tmp_path / "ranks")
    prune, export = next_commands(ranked)
    assert prune == ["prune", *export[1:]] == [*prune[:-1], "FOLDER"]
    assert export[:4] == ["export", str(adapter), "--data", str(table)]
    exported = run(*export[:-1], tmp_path / "plain")
    assert f"{tmp_path / 'plain' / 'README.md'} has the lines that load it." in exported
    (after_export,) = next_commands(exported)
    assert after_export == ["evaluate", str(tmp_path / "plain"), "--data", "LABELLED"]
    assert "accuracy" in run(*after_export[:-1], table)


@pytest.mark.parametrize("mode", ["draws", "merged"])
def test_what_is_exported_is_evaluated_where_that_is_possible(mode, adapter, table, tmp_path, run):
    exported = run("export", adapter, "--data", table, "--mode", mode, "--output", tmp_path / "o")
    (after,) = next_commands(exported)
    folder = {"draws": tmp_path / "o" / "draw-0", "merged": adapter}[mode]
    assert after == ["evaluate", str(folder), "--data", "LABELLED"]
    assert "accuracy" in run(*after[:-1], table)


def test_predictions_are_calibrated_then_reviewed_and_trained_on(
    adapter, table, tmp_path, run, monkeypatch
):
    """Every command is the ending of the one before it."""
    monkeypatch.chdir(tmp_path)
    output = ["--output", "p.jsonl"]
    (calibrate,) = next_commands(run("predict", adapter, "--data", table, *output))
    assert calibrate[:4] == ["evaluate", str(adapter), "--data", "LABELLED"]
    assert calibrate[4:] == ["--calibrate-risk", "0.1"]
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "t.jsonl").write_bytes(table.read_bytes())
    files = run("predict", adapter, "--data", tables, "--output", "out", "--executor", "local")
    assert next_commands(files) == [calibrate]
    assert next_commands(run("review", adapter, "--data", table)) == [calibrate]
    calibrate[3:] = [table, "--calibrate-risk", 0.6, "--calibrate-delta", 0.4, "--num-draws", 3]
    (predict,) = next_commands(run(*calibrate))
    given = ["--abstain-at-risk", "0.6", "--num-draws", "3", "--seed", "0"]
    assert predict == ["predict", str(adapter), "--data", "TABLE", *given]
    predict[3] = table
    (review,) = next_commands(run(*predict, *output))
    assert review == ["review", str(adapter), "--data", str(table), *given, "--output", review[-1]]
    (train,) = next_commands(run(*review))
    assert (tmp_path / review[-1]).is_file()
    assert train[-4:] == ["--data", "LABELLED", "--output", "FOLDER"]
    selected = run(
        "select", adapter, "--data", table, "--k", 2, "--by", "entropy", "--output", "l.csv"
    )
    assert next_commands(selected) == [train]
    train[-3], train[-1] = table, "again"
    assert next_commands(run(*train))
    assert (tmp_path / "again" / "adapter_config.json").is_file()


def test_a_dry_run_ends_with_the_run(tiny_model_dir, table, tmp_path, call):
    """On standard error: standard output is the recipe, or the cells."""
    output = tmp_path / "an adapter"
    typed = ["train", "--model", tiny_model_dir, "--data", table, "--output", output]
    typed += ["--method", "lora", "--set", "training.max_steps=1"]
    code, recipe, aside = call(*typed, "--dry-run")
    assert code == 0
    (tmp_path / "recipe.yaml").write_text(recipe, "utf-8")
    assert TrainRecipe.load(tmp_path / "recipe.yaml").output == str(output)
    (run,) = next_commands(aside)
    assert run == [str(word) for word in typed]
    assert call(*run)[0] == 0
    assert (output / "adapter_config.json").is_file()


def test_predictions_on_standard_output_are_nothing_else(adapter, table, run):
    for line in run("predict", adapter, "--data", table).splitlines():
        assert "prediction" in json.loads(line)


def test_probabilities_are_strictly_inside():
    assert probability(None) is None
    assert probability(0.5) == 0.5


def test_a_bar_knows_how_much_is_to_come(tmp_path):
    assert row_count([1, 2, 3], None) == 3
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert row_count(iter(()), str(lines)) == 2
    assert row_count(iter(()), "-") is None
    assert row_count(iter(()), None) is None


def test_bars_tell_the_time_left(monkeypatch):
    """tqdm's bar, as everything over batches shows it."""
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress_bar(range(3), description="certifying", progress=True)) == [0, 1, 2]
    assert "certifying:" in terminal.getvalue()
    assert re.search(r"\[\d\d:\d\d<", terminal.getvalue())  # the time taken, and the time left
    shown = terminal.getvalue()
    assert list(progress_bar(range(3), description="certifying", progress=None)) == [0, 1, 2]
    assert terminal.getvalue() == shown  # it is no terminal


def test_predictions_of_files_tell_the_time_left(adapter, table, tmp_path, terminal, monkeypatch):
    """By the bytes of the files, chunk by chunk; an interrupted run has the rest to do."""
    monkeypatch.setattr("bara.finetuning.predict_dataset.CHUNK", 6)
    (tmp_path / "tables").mkdir()
    for name in ("a", "b"):
        (tmp_path / "tables" / f"{name}.jsonl").write_bytes(table.read_bytes())
    options = {"num_draws": 1, "batch_size": 16}
    for _ in range(2):
        predict_dataset(adapter, tmp_path / "tables", tmp_path / "out", **options)
        shown = terminal()
        (tmp_path / "out" / "b.jsonl").unlink()
        assert re.search(r"predicting: 100%.*\[\d\d:\d\d<00:00", shown)
    assert f"/{table.stat().st_size} " in shown


def test_next_commands_can_be_typed(capsys):
    say_next(["bara", "evaluate", Path("my adapter"), "--data", "T"])
    assert capsys.readouterr().out == "Next:\n  bara evaluate 'my adapter' --data T\n"
