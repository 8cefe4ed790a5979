"""Every option of every command: an error about its value names it as it was typed."""

import inspect
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import pytest
from peft import LoraConfig
from typer.models import OptionInfo

from bara.cli.app import app
from bara.cli.options import probability
from bara.finetuning.finetune import finetune
from bara.methods.recipe import TrainRecipe
from conftest import write_jsonl

COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands}
USERS_OWN = {
    *("--data", "--ood", "--against", "--held-out", "--validation"),
    *("--output", "--json", "--page", "--config", "--save-config", "--load-into", "--ray-address"),
    *("--model", "--base-model", "--dtype", "--labels", "--baseline"),
}
"""Options whose values are files, folders and names of the user's own: errors show the value."""
OUT = ["--output", "OUT"]
TEXTS = [
    (["train", "--model", "M", "--task", "guess"], "--task"),
    (["train", "--model", "M", "--method", "guess"], "--method"),
    (["train", "--model", "M", "--scoring", "letter"], "--scoring"),
    (["train", "--set", "nonsense"], "--set"),
    (["train", "--model", "M", "--rank", "0"], "--rank"),
    (["train", "--model", "M", "--epochs", "-1"], "--epochs"),
    (["train", "--model", "M", "--batch-size", "0"], "--batch-size"),
    (["train", "--model", "M", "--learning-rate", "0"], "--learning-rate"),
    (["train", "--model", "M", "--prior-fraction", "0.2"], "--prior-fraction"),
    (["tune", "--model", "M", "--task", "guess"], "--task"),
    (["tune", "--model", "M", "--method", "guess"], "--method"),
    (["tune", "--model", "M", "--method", "probe"], "--method"),
    (["tune", "--model", "M", "--method", "lora+temperature"], "--method"),
    (["tune", "--set", "nonsense"], "--set"),
    (["tune", "--model", "M", "--learning-rate", "1", "0.1"], "--learning-rate"),
    (["tune", "--model", "M", "--learning-rate", "1", "inf"], "--learning-rate"),
    (["tune", "--model", "M", "--epochs", "0", "3"], "--epochs"),
    (["tune", "--model", "M", "--strength", "-1", "1"], "--strength"),
    (["tune", "--model", "M", "--method", "lora", "--strength", "1", "2"], "--strength"),
    (["bayesianize", "A", "--data", "D", *OUT, "--method", "guess"], "--method"),
    (["bayesianize", "A", "--data", "D", *OUT, "--set", "nonsense"], "--set"),
    (["generate", "A", "w", "--set", "nonsense"], "--set"),
    (["select", "A", "--data", "D", "--by", "guess"], "--by"),
    (["select", "A", "--data", "D", "--output", "x.txt"], "--output"),
    (["review", "A", "--data", "D", "--output", "x.txt"], "--output"),
    (["export", "A", *OUT, "--mode", "guess"], "--mode"),
    (["export", "A", *OUT, "--server", "guess"], "--server"),
    (["prune", "A", "--data", "D", *OUT, "--threshold", "2"], "--threshold"),
    (["prune", "A", "--data", "D", *OUT, "--tolerance", "-1"], "--tolerance"),
    (["predict", "A", "--keep-column", "id"], "--keep-column"),
    (["predict", "A", "--output-format", "csv"], "--output-format"),
    (["serve", "A", "--host", "300.0.0.0"], "--host"),
    (["serve", "A", "--api-key-file", "none"], "--api-key-file"),
]
"""What is refused before a model or a table is looked at."""
WITH_FILES = [
    (["train", "--model", "M", "--data", "T", "--text-column", "no"], "--text-column"),
    (["train", "--model", "M", "--data", "T", "--text-pair-column", "no"], "--text-pair-column"),
    (["train", "--model", "M", "--data", "T", "--label-column", "no"], "--label-column"),
    (
        ["train", "--model", "M", "--data", "T", "--task", "causal-lm", "--max-length", "1"],
        "--max-length",
    ),
    (
        ["train", "--model", "M", "--data", "T", "--task", "multiple-choice", "--scoring", "x"],
        "--scoring",
    ),
    (["train", "--resume", "--output", "A", "--label-column", "no"], "--label-column"),
    (["train", "--resume", "--output", "A", "--rank", "3"], "--rank"),
    (["tune", "--model", "M", "--data", "T", *OUT, "--metric", "rmse"], "--metric"),
    (["tune", "--model", "M", "--data", "T", *OUT, "--metric", "guess"], "--metric"),
    (["tune", "--model", "M", "--data", "T", *OUT, "--folds", "17"], "--folds"),
    (["bayesianize", "L", "--data", "T", *OUT, "--task", "guess"], "--task"),
    (["bayesianize", "L", "--data", "T", *OUT, "--text-column", "no"], "--text-column"),
    (["bayesianize", "L", "--data", "T", *OUT, "--text-pair-column", "no"], "--text-pair-column"),
    (["bayesianize", "L", "--data", "T", *OUT, "--label-column", "no"], "--label-column"),
    (["select", "A", "--data", "T", "--k", "17"], "--k"),
    *(
        ([command, "A", "--data", "T", "--split", "test"], "--split")
        for command in ("evaluate", "predict", "select", "review", "certify", "ranks")
    ),
    (["predict", "A", "--data", "T", *OUT, "--executor", "local", "--split", "x"], "--split"),
    (["predict", "A", "--data", "T", "--output", "T", "--executor", "local"], "--output"),
    (
        ["predict", "A", "--data", "T", *OUT, "--executor", "local", "--keep-column", "no"],
        "--keep-column",
    ),
    (["evaluate", "A", "--data", "T", "--set", "num_beams=2"], "--set"),
    (["evaluate", "A", "--data", "T", "--calibrate-risk", "0.001"], "--calibrate-risk"),
]
"""The same with a table T of 16 rows, an adapter A for them and a LoRA adapter L from elsewhere."""


class Given(NamedTuple):
    """An option of a command as its signature has it."""

    flag: str
    kind: object
    info: OptionInfo


def options(function):
    for name, hint in get_type_hints(function, include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                # beside a type typer keeps the first name where a default would be
                named = [info.default, *(info.param_decls or ())]
                typed = [text for text in named if str(text).startswith("--")]
                kinds = set(get_args(hint)[:1])
                kinds = set(get_args(*kinds)) - {type(None)} or kinds
                kind = kinds.pop() if len(kinds) == 1 else get_args(hint)[0]
                yield Given((typed or [f"--{name.replace('_', '-')}"])[0], kind, info)


def required(function):
    """What has to be there for a command line to be read."""
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is inspect.Parameter.empty and name != "context":
            if f"--{name}" in {given.flag for given in options(function)}:
                yield f"--{name}"
            yield "X"


def unreadable(given):
    """Values that the command line refuses by an option's type, its bounds or its callback."""
    kind, info = given.kind, given.info
    if kind in (int, float):
        values = ["many"]
        values += [] if info.min is None else [info.min - 1]
        values += [] if info.max is None else [info.max * 2]
        values += ["0", "1.5", "nan"] if info.callback is probability else []
        return [[value] for value in values]
    if get_args(kind)[:1] in ((int,), (float,)):
        return [["many", "1"], ["1", "many"]]
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return [["guess"]]
    return [["/nowhere"]] if info.exists else []


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_read_is_named(command, failing):
    function = COMMANDS[command]
    for given in options(function):
        for values in unreadable(given):
            error = failing(command, *required(function), given.flag, *values)
            assert given.flag in error, (given, values)


@pytest.fixture
def files(tmp_path, tiny_model_dir, monkeypatch):
    """What stands for A, L and T; all commands run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"the film {i} is {word}", "label": word}
        for i in range(8)
        for word in ("good", "bad")
    ]
    table = write_jsonl(tmp_path / "table.jsonl", rows)
    training = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    recipe = TrainRecipe(
        model=str(tiny_model_dir), data=str(table), output="adapter", training=training
    )
    lora = LoraConfig(task_type="SEQ_CLS", base_model_name_or_path=str(tiny_model_dir))
    lora.save_pretrained("lora")
    return {"A": finetune(recipe), "T": table, "L": Path("lora")}


@pytest.mark.parametrize(("arguments", "option"), TEXTS)
def test_what_cannot_be_used_is_named(arguments, option, failing):
    assert option in failing(*arguments)


def test_what_the_files_do_not_allow_is_named(files, failing):
    for arguments, option in WITH_FILES:
        given = [files.get(word, word) for word in arguments]
        assert option in failing(*given), arguments


def test_no_option_is_left_out():
    checked = {(arguments[0], option) for arguments, option in [*TEXTS, *WITH_FILES]}
    for command, function in COMMANDS.items():
        for given in options(function):
            own = given.flag in USERS_OWN or given.kind is bool
            assert own or unreadable(given) or (command, given.flag) in checked, (command, given)
