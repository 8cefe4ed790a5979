"""What a user may type or point a command at: one line, at once, that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    TrainerCallback,
)

import bara
from bara import BaraError
from bara.data.tables import load_table
from bara.finetuning.finetune import finetune
from bara.language.tasks import LanguageTask
from bara.methods.recipe import TrainRecipe
from bara.models.base import load_base
from bara.schema import json_text
from conftest import VOCABULARY, tiny_bert_config, write_jsonl
from helpers import tiny_gpt2, tiny_llama
from test_cli import base_and_table, sentences, small_files_only, train_arguments

__all__ = ["small_files_only"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A trained adapter, its base model and its table."""
    folder = tmp_path_factory.mktemp("whole")
    table = base_and_table(folder, tiny_tokenizer)
    training = {"num_train_epochs": 1, "save_strategy": "no"}
    finetune(
        TrainRecipe(
            model=str(folder / "base"),
            data=str(table),
            output=str(folder / "adapter"),
            training=training,
        )
    )
    return folder


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        *(("--epochs", value) for value in (0, -1, "nan", "inf", "1e300", "many")),
        *(("--learning-rate", value) for value in (0, -0.1, "nan", "inf", "fast")),
        *(("--batch-size", value) for value in (0, -1, 2**64, 1.5)),
        *(("--seed", value) for value in (-1, 2**32, 2**70, "x")),
        *(("--rank", value) for value in (10**9, "1e9", 2**70)),
        ("--prior-fraction", "nan"),
        ("--task", "ranking"),
    ],
)
def test_training_options_are_named_as_they_were_typed(
    typed: str, value: object, failing: Callable[..., str]
) -> None:
    options = ["--method", "certified"] if typed == "--prior-fraction" else []
    line = failing("train", "--model", "m", "--data", "d.csv", *options, f"{typed}={value}")
    assert typed in line or typed.strip("-") in line.partition("must be")[0]


@pytest.mark.parametrize("draws", [10**9, "1e9", 10**30, -1])
@pytest.mark.parametrize("command", ["predict", "evaluate", "ranks", "prune", "export", "generate"])
def test_draws_without_end_are_refused_before_the_work(
    whole: Path, tmp_path: Path, command: str, draws: object, failing: Callable[..., str]
) -> None:
    given = [command, whole / "adapter", "--data", whole / "table.jsonl"]
    line = failing(*given, "--output", tmp_path / "out", "--num-draws", draws)
    assert "--num-draws" in line or "No such option" in line


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_of_draws_are_checked(whole: Path, seed: int, failing: Callable[..., str]) -> None:
    given = [whole / "adapter", "--data", whole / "table.jsonl", "--seed", seed]
    for command in ("predict", "evaluate"):
        assert "--seed" in failing(command, *given)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("training.learning_rate=[", "--set 'training.learning_rate=[': the value is not YAML"),
        ("training.learning_rate=!!python/name:os.system", "the value is not YAML"),
        ("method_options={a: &x [*x]}", "the value is not YAML"),
        ("training.report_to=tensorbored", "training.report_to must be"),
        ("training.gradient_accumulation_steps=0", "gradient_accumulation_steps must be at least"),
        ("training.optim=fastest", "training: "),
        ("seed=4294967296", "seed must be below"),
        ("=3", "there is no ''"),
    ],
)
def test_set_is_checked(
    whole: Path, tmp_path: Path, option: str, message: str, failing: Callable[..., str]
) -> None:
    given = train_arguments(whole / "base", whole / "table.jsonl", tmp_path / "out")
    assert message in failing(*given, "--set", option)


@pytest.mark.parametrize("name", ["[bold]x", "a[/]b", "[red", ":smile:", "[link=x]y[/link]"])
def test_names_are_no_markup(
    whole: Path, tmp_path: Path, name: str, run: Callable[..., str], failing: Callable[..., str]
) -> None:
    folder = tmp_path / "f" / name.replace("/", "\\")
    shutil.copytree(whole / "adapter", folder)
    table = shutil.copy(whole / "table.jsonl", folder.parent / f"{folder.name}.jsonl")
    for command in (["evaluate"], ["ranks", "--output", folder / "report"]):
        shown = run(*command, folder, "--data", table, "--num-draws", 1)
        assert folder.name in "".join(shown.split())
    assert name.split("/")[0] in failing("predict", f"none{name}")
    assert name in failing("train", "--model", "m", "--data", "d.csv", "--method", name)


def test_links_in_a_loop_are_one_line(
    whole: Path, tmp_path: Path, run: Callable[..., str], failing: Callable[..., str]
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    table = whole / "table.jsonl"
    assert "loop" in failing(*train_arguments(whole / "base", table, loop))
    assert "loop" in failing(*train_arguments(loop, table, tmp_path / "out"))
    assert "loop" in failing("train", "--config", loop)
    assert "loop" in failing("predict", loop)
    assert "loop" in failing("predict", whole / "adapter", "--data", loop)
    export = ["export", whole / "adapter", "--mode", "mean", "--data", table]
    assert "loop" in failing(*export, "--output", loop)
    assert "loop" in failing("bench", loop)
    run("predict", whole / "adapter", "--data", table, "--output", loop)  # takes its place
    assert loop.read_text().count("\n") == len(sentences())


def test_results_that_are_binary_are_damaged(
    tmp_path: Path, failing: Callable[..., str], whole: Path
) -> None:
    spec = tmp_path / "small.yaml"
    spec.write_text("model: minilm\ntasks: [digits]\nmethods: [lora]\n")
    for content in (
        b"\xff\xfe\x00\n",
        b"[" * 10**5 + b"\n",
        b'{"key": [1]}\n',
        b"9" * 5000 + b"\n",
    ):
        (tmp_path / "results.jsonl").write_bytes(content)
        line = failing("bench", spec, "--output", tmp_path, "--dry-run")
        assert "results.jsonl, line 1 is damaged" in line


def test_a_csv_of_numbers_is_predicted_as_the_same_jsonl(
    whole: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    texts = ["007", "1.50", "42"]
    rows = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    (tmp_path / "texts.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts))
    expected = run("predict", whole / "adapter", "--data", rows)
    assert run("predict", whole / "adapter", "--data", tmp_path / "texts.csv") == expected


def test_a_custom_text_column_of_numbers_stays_text(
    whole: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    table = tmp_path / "codes.csv"
    table.write_text("body,code\n" + "007,01\n1.50,02\n" * 4)
    output = tmp_path / "out"
    columns = ["--text-column", "body", "--label-column", "code"]
    run(*train_arguments(whole / "base", table, output, *columns, "--validation", table))
    lines = run("predict", output, "--data", table, "--num-draws", 1).splitlines()
    assert {json.loads(line)["prediction"] for line in lines} <= {"01", "02"}
    assert set(json.loads(lines[0])["probabilities"]) == {"01", "02"}
    run("evaluate", output, "--data", table, "--ood", table, "--num-draws", 1)
    run("ranks", output, "--data", table, "--output", tmp_path / "ranks", "--num-draws", 1)


@pytest.mark.parametrize("name", ["label", "label_ids"])
def test_evaluate_takes_the_label_columns_that_trainer_takes(whole: Path, name: str) -> None:
    model, tokenizer, task = bara.load_adapter(whole / "adapter")
    inputs = task.inputs(load_table(whole / "table.jsonl"), tokenizer)
    expected = bara.evaluate(model, inputs, num_draws=2).to_dict()
    renamed: Dataset = inputs.rename_column("labels", name)
    assert bara.evaluate(model, renamed, num_draws=2).to_dict() == expected
    loader = torch.utils.data.DataLoader(renamed.with_format("torch"), batch_size=1)
    assert bara.evaluate(model, loader, num_draws=2).to_dict() == pytest.approx(expected, rel=1e-4)


def test_json_has_no_infinity() -> None:
    written = json_text({"a": float("inf"), "b": [float("nan"), 1.5], "c": (2,)})
    assert json.loads(written) == {"a": None, "b": [None, 1.5], "c": [2]}


def test_what_is_no_causal_language_model_is_refused(
    tmp_path: Path, tiny_tokenizer, failing: Callable[..., str]
) -> None:
    task = LanguageTask("causal-lm")
    torch.manual_seed(0)
    BertForSequenceClassification(tiny_bert_config()).save_pretrained(tmp_path / "headless")
    BertForMaskedLM(tiny_bert_config()).save_pretrained(tmp_path / "masked")
    for name, message in (("headless", "has no weights for cls"), ("masked", "reads texts both")):
        tiny_tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(BaraError, match=f"is no causal language model .*{message}"):
            load_base(str(tmp_path / name), task, {})
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "the film was good"}] * 4)
    given = train_arguments(tmp_path / "headless", texts, tmp_path / "out", "--task", "causal-lm")
    assert "is no causal language model" in failing(*given)
    assert not (tmp_path / "out").exists()


def test_causal_language_models_still_load(tmp_path: Path) -> None:
    task = LanguageTask("causal-lm")
    decoder = BertConfig(**{**tiny_bert_config().to_dict(), "is_decoder": True})
    assert decoder.vocab_size == len(VOCABULARY)
    from transformers import BertLMHeadModel

    models = {"llama": tiny_llama(), "gpt2": tiny_gpt2(), "bert": BertLMHeadModel(decoder)}
    models["tied"] = tiny_llama(tie_word_embeddings=True)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        load_base(str(tmp_path / name), task, {})


def test_a_full_disk_at_the_first_checkpoint_says_that_there_is_no_earlier_one(
    whole: Path, tmp_path: Path, small_files_only: Callable[[int], None]
) -> None:
    class FillDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            small_files_only(4096)

    recipe = TrainRecipe(
        model=str(whole / "base"),
        data=str(whole / "table.jsonl"),
        output=str(tmp_path / "out"),
        training={"num_train_epochs": 3, "per_device_train_batch_size": 8},
    )
    with pytest.raises(BaraError, match="there is no earlier one, so make room and start again"):
        finetune(recipe, callbacks=[FillDisk()])
