"""How commands end, what their errors call an option, and what tells the time left."""

import io
import json
import shlex
import sys
from pathlib import Path

import pytest

from bara.cli.options import probability
from bara.cli.terminal import row_count, say_next
from bara.finetuning.finetune import finetune
from bara.methods.recipe import TrainRecipe
from bara.prediction.batches import progress_bar
from conftest import write_jsonl


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


def next_commands(printed):
    """The commands under "Next:", which comes last."""
    _, _, after = printed.partition("Next:\n")
    assert after
    assert all(line.startswith("  bara ") for line in after.splitlines())
    return [shlex.split(line) for line in after.splitlines()]


def test_commands_end_with_one_that_runs(adapter, table, tmp_path, run):
    """A folder with a space in its name, too; capitals are filled in as a user would."""
    predictions = tmp_path / "predictions.jsonl"
    endings = {
        "evaluate": run("evaluate", adapter, "--data", table),
        "ranks": run("ranks", adapter, "--data", table, "--output", tmp_path / "ranks"),
        "predict": run("predict", adapter, "--data", table, "--output", predictions),
    }
    (after_evaluate,) = next_commands(endings["evaluate"])
    assert after_evaluate == ["bara", "predict", str(adapter), "--data", "TABLE"]
    assert len(run(*after_evaluate[1:-1], table).splitlines()) == 16
    prune, export = next_commands(endings["ranks"])
    assert prune == ["bara", "prune", *export[2:]] == [*prune[:-1], "FOLDER"]
    assert export[:5] == ["bara", "export", str(adapter), "--data", str(table)]
    exported = run(*export[1:-1], tmp_path / "plain")
    assert f"{tmp_path / 'plain' / 'README.md'} has the lines that load it." in exported
    (after_predict,) = next_commands(endings["predict"])
    assert after_predict[:3] == ["bara", "evaluate", str(adapter)]
    assert {"--data", "LABELLED", "--calibrate-risk"} <= set(after_predict)


def test_predictions_on_standard_output_are_nothing_else(adapter, table, run):
    for line in run("predict", adapter, "--data", table).splitlines():
        assert "prediction" in json.loads(line)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["evaluate", "A", "--data", "T", "--calibrate-risk", "2"], "--calibrate-risk"),
        (["evaluate", "A", "--data", "T", "--calibrate-delta", "nan"], "--calibrate-delta"),
        (["certify", "A", "--data", "T", "--delta", "0"], "--delta"),
        (["predict", "A", "--abstain-at-risk", "-1"], "--abstain-at-risk"),
        (["predict", "A", "--coverage", "1.5"], "--coverage"),
        (["generate", "A", "--abstain-at-risk", "1"], "--abstain-at-risk"),
        (["predict", "A", "--num-draws", "0"], "--num-draws"),
        (["ranks", "A", "--data", "T", "--seed", "-1"], "--seed"),
        (["train", "--model", "M", "--rank", "0"], "--rank"),
        (["train", "--model", "M", "--max-length", "0"], "--max-length"),
        (["train", "--model", "M", "--epochs", "-1"], "--epochs"),
        (["train", "--model", "M", "--batch-size", "0"], "--batch-size"),
        (["train", "--model", "M", "--task", "guess"], "--task"),
        (["train", "--model", "M", "--method", "guess"], "--method"),
        (["train", "--model", "M", "--scoring", "letter"], "--scoring"),
        (["train", "--model", "M", "--prior-fraction", "0.2"], "--prior-fraction"),
        (["train", "--model", "M", "--prior-fraction", "3"], "--prior-fraction"),
    ],
)
def test_an_error_names_the_option_that_was_typed(arguments, option, failing):
    assert option in failing(*arguments)


def test_a_column_s_option_is_named(tiny_model_dir, table, tmp_path, failing):
    for option in ("--text-column", "--label-column"):
        given = ["--model", tiny_model_dir, "--data", table, "--output", tmp_path / "out"]
        error = failing("train", *given, option, "other")
        assert f"'other' ({option})" in error


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
    """Rich's bar, as everything over batches shows it."""
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress_bar(range(3), description="certifying", progress=True)) == [0, 1, 2]
    assert "certifying" in terminal.getvalue()
    assert "0:00:0" in terminal.getvalue()


def test_next_commands_can_be_typed(capsys):
    say_next(["bara", "evaluate", Path("my adapter"), "--data", "T"])
    assert capsys.readouterr().out == "Next:\n  bara evaluate 'my adapter' --data T\n"
