"""`bara train`, `evaluate` and `predict` for labels, tags and answers, on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import BertForMaskedLM, BertTokenizerFast

import bara
from bara.finetuning.load import load_adapter, read_task
from bara.finetuning.task_inputs import read_table
from conftest import tiny_bert_config, write_jsonl

NOUNS = ("film", "plot", "food")
GOOD = ("good", "great", "fine")
BAD = ("bad", "awful", "poor")


def labelled() -> list[dict[str, object]]:
    """Labels `praise` and `film`, which go their own ways; some texts have none."""
    rows = []
    for noun in NOUNS:
        for word in (*GOOD, *BAD):
            labels = ["praise"] * (word in GOOD) + ["film"] * (noun == "film")
            rows.append({"text": f"the {noun} is {word}", "labels": labels})
    return rows


def tagged() -> list[dict[str, object]]:
    """`goodfilm` is two tokens of the tiny vocabulary or more, unknown or not."""
    return [
        {"tokens": ["the", noun, "is", word], "tags": ["O", "B-THING", "O", "O"]}
        for noun in NOUNS
        for word in (*GOOD, *BAD)
    ]


def asked() -> list[dict[str, object]]:
    rows = []
    for noun in NOUNS:
        for word in (*GOOD, *BAD):
            context = f"it was cold . the {noun} is {word} . it is not warm"
            answer = {"text": [word], "answer_start": [context.index(f"is {word}") + 3]}
            rows.append({"question": f"the {noun} is", "context": context, "answers": answer})
    return rows


ROWS: dict[str, Callable[[], list[dict[str, object]]]] = {
    "multi-label": labelled,
    "token-classification": tagged,
    "question-answering": asked,
}
OPTIONS: dict[str, list[str]] = {
    "multi-label": [],
    "token-classification": [],
    "question-answering": ["--max-length", "16", "--set", "stride=4"],
}
HEADS = {
    "multi-label": "classifier",
    "token-classification": "classifier",
    "question-answering": "qa_outputs",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: BertTokenizerFast) -> Path:
    """A checkpoint without any of the heads."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    BertForMaskedLM(tiny_bert_config()).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def train_options(task: str, base: Path, table: Path, output: Path, *more: object) -> list[Any]:
    return [
        *("train", "--task", task, "--model", base, "--data", table, "--output", output),
        *(() if "full" in more else ("-r", 4)),
        *("--epochs", 2, "--batch-size", 6, *OPTIONS[task], *more),
    ]


@pytest.fixture(scope="module")
def trained(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """The adapter and the table of a task, trained once."""
    from bara.cli import main

    folder = tmp_path_factory.mktemp("tasks")

    def make(task: str) -> tuple[Path, Path]:
        output, table = folder / task, folder / f"{task}.jsonl"
        if not output.exists():
            write_jsonl(table, ROWS[task]())
            options = train_options(task, base, table, output, "--validation", table)
            assert main([str(option) for option in options]) == 0
        return output, table

    return make


@pytest.mark.parametrize("task", ROWS)
def test_an_adapter_comes_back_and_is_evaluated(task, trained, run, tmp_path):
    folder, table = trained(task)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert any(HEADS[task] in name for name in file.keys())  # noqa: SIM118
    run("evaluate", folder, "--data", table, "--num-draws", 3, "--json", tmp_path / "m.json")
    written = json.loads((tmp_path / "m.json").read_text())
    model, tokenizer, loaded = load_adapter(folder)
    data = loaded.inputs(read_table(str(table), loaded), tokenizer)
    again = bara.evaluate(model, data, num_draws=3)
    assert written["metrics"] == pytest.approx(again.to_dict(), abs=1e-6)
    assert written["num_texts"] == 18
    if task == "multi-label":
        assert set(written["by_label"]) == {"film", "praise"}
        assert written["by_label"]["film"]["frequency"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("task", ROWS)
def test_predictions_are_one_line_for_each_input(task, trained, run, tmp_path):
    folder, _ = trained(task)
    rows = ROWS[task]()
    for row in rows:
        for column in ("labels", "tags", "answers"):
            row.pop(column, None)
    unlabelled = write_jsonl(tmp_path / "new.jsonl", rows)
    output = run("predict", folder, "--data", unlabelled, "--num-draws", 3)
    lines = [json.loads(line) for line in output.splitlines()]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        assert 0 < line["confidence"] <= 1
        if task == "multi-label":
            assert line["prediction"] == [
                name for name, label in line["labels"].items() if label["probability"] > 0.5
            ]
        elif task == "token-classification":
            assert [word["word"] for word in line["words"]] == row["tokens"]
            assert line["prediction"] == [word["prediction"] for word in line["words"]]
        else:
            assert line["prediction"] == row["context"][line["start"] : line["end"]]
            assert line["answers"][0]["probability"] == line["confidence"]


@pytest.mark.parametrize("task", ROWS)
def test_abstaining_keeps_to_a_threshold(task, trained, run, tmp_path):
    folder, table = trained(task)
    many = write_jsonl(tmp_path / "many.jsonl", ROWS[task]() * 4)
    run("evaluate", folder, "--data", many, "--calibrate-risk", 0.9, "--num-draws", 2)
    output = run(*("predict", folder, "--data", table, "--num-draws", 2, "--abstain-at-risk", 0.9))
    lines = [json.loads(line) for line in output.splitlines()]
    assert all(line["abstained"] == (line["prediction"] is None) for line in lines)
    saved = json.loads((folder / "abstention.json").read_text())["0.9"]
    limit = -math.inf if saved["uncertainty"] is None else saved["uncertainty"]
    clear = [line for line in lines if abs(1 - line["confidence"] - limit) > 1e-6]
    assert [line["abstained"] for line in clear] == [
        1 - line["confidence"] > limit for line in clear
    ]


@pytest.mark.parametrize("task", ROWS)
def test_other_commands_take_the_adapter_or_refuse_it(task, trained, run, failing, tmp_path):
    folder, table = trained(task)
    if task == "question-answering":
        run("ranks", folder, "--data", table, "--output", tmp_path / "ranks", "--num-draws", 2)
    exported = run(
        *("export", folder, "--mode", "draws", "-n", 2, "--data", table),
        *("--output", tmp_path / "draws", "--batch-size", 64),
    )
    assert json.loads((tmp_path / "draws" / "manifest.json").read_text())["task"] == task
    assert "Distance to the original on 9 held-out texts" in exported
    assert "certif" in failing("certify", folder, "--data", table)
    assert "--ood" in failing("evaluate", folder, "--data", table, "--ood", table)


@pytest.mark.parametrize(
    ("method", "task"),
    [
        ("balora", "token-classification"),
        ("blob", "question-answering"),
        ("scalabl", "multi-label"),
        ("full", "question-answering"),
        ("ensemble", "token-classification"),
    ],
)
def test_other_families_train_and_load(method, task, base, run, tmp_path):
    table = write_jsonl(tmp_path / "table.jsonl", ROWS[task]()[:6])
    more = ["--set", "training.max_steps=1", "--method", method]
    if method == "ensemble":
        more += ["--set", "method_options.num_members=2"]
    run(*train_options(task, base, table, tmp_path / "a", *more))
    model, tokenizer, loaded = load_adapter(tmp_path / "a")
    assert loaded.task == task
    data = loaded.inputs(read_table(str(table), loaded), tokenizer)
    predictive = bara.predict(model, data, num_draws=2)
    assert len(predictive.to_records()) == 6


@pytest.mark.parametrize("task", ROWS)
def test_a_certificate_and_some_methods_are_refused_in_one_line(task, base, failing, tmp_path):
    table = write_jsonl(tmp_path / "table.jsonl", ROWS[task]())
    options = train_options(task, base, table, tmp_path / "a")
    for method in ("certified", "tfb", "laplace"):
        failing(*options, "--method", method, "--overwrite")
    if task == "question-answering":
        more = ("--validation", table, "--method", "lora+temperature", "--overwrite")
        assert "leave out +temperature" in failing(*options, *more)


@pytest.mark.parametrize("task", ["multi-label", "token-classification"])
def test_a_temperature_is_fitted_and_loaded(task, base, run, tmp_path):
    table = write_jsonl(tmp_path / "table.jsonl", ROWS[task]())
    more = ("--validation", table, "--method", "bara+temperature", "--set", "training.max_steps=2")
    run(*train_options(task, base, table, tmp_path / "a", *more))
    saved = json.loads((tmp_path / "a" / "temperature.json").read_text())["temperature"]
    model, _, _ = load_adapter(tmp_path / "a")
    assert saved != 1
    assert model.config.predictive_temperature == saved


def test_labels_of_a_csv_have_semicolons_between_them(base, run, tmp_path):
    lines = [f"{row['text']},{';'.join(row['labels'])}" for row in labelled()]
    table = tmp_path / "table.csv"
    table.write_text("text,labels\n" + "\n".join(lines) + "\n", "utf-8")
    output = tmp_path / "a"
    more = ["--set", "training.max_steps=1"]
    run(*train_options("multi-label", base, table, output, *more))
    task = read_task(output)
    assert task.label_names == ("film", "praise")
    rows = task.encode_labels(read_table(str(table), task))
    expected = [[float("film" in r["labels"]), float("praise" in r["labels"])] for r in labelled()]
    assert rows == expected


def test_numbers_of_a_csv_are_labels_too(tmp_path):
    from bara.data.multi_label_task import MultiLabelTask
    from bara.data.tables import load_table

    table = tmp_path / "table.csv"
    table.write_text("text,labels\na film,3\na plot,10\nfood,\n", "utf-8")
    dataset = load_table(table, text_columns=["labels"])
    task = MultiLabelTask.infer(dataset)
    assert task.label_names == ("10", "3")
    assert task.encode_labels(read_table(str(table), task)) == [[0, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("multi-label", {"labels": None}, "row 1"),
        ("multi-label", {"labels": [None]}, "row 1"),
        ("token-classification", {"tags": ["O"]}, "a tag for each of the 4 words in row 1"),
        ("token-classification", {"tokens": "the film"}, "list of words"),
        ("token-classification", {"tokens": ["the", "", "is", "it"]}, "list of words"),
        ("token-classification", {"tokens": ["the"] * 99, "tags": ["O"] * 99}, "101 tokens"),
        ("token-classification", {"tokens": ["a", "\u200b", "a", "a"]}, "nothing to the tokeniser"),
        ("question-answering", {"context": ""}, "row 1 needs a text in the column 'context'"),
        ("question-answering", {"answers": None}, "row 1, column 'answers'"),
        (
            "question-answering",
            {"answers": {"text": ["warm"], "answer_start": [0]}},
            "the context does not say 'warm' at 0",
        ),
        ("question-answering", {"question": "the film is " * 5}, "raise --max-length"),
        (
            "question-answering",
            {
                "context": "it was cold . the film is good . it is not warm",
                "answers": {"text": ["cold . the film is good . it is"], "answer_start": [7]},
            },
            "no window holds the whole answer",
        ),
    ],
)
def test_what_is_wrong_is_one_line(task, change, message, base, failing, tmp_path):
    rows = ROWS[task]()
    if change == {"labels": None} or change == {"answers": None}:
        rows = [{**row, **change} for row in rows]  # else a column of two types
    else:
        rows[0] = {**rows[0], **change}
    if change.get("tokens") == "the film":
        rows = [{**row, **change} for row in rows]
    table = write_jsonl(tmp_path / "table.jsonl", rows)
    assert message in failing(*train_options(task, base, table, tmp_path / "a"))


def test_words_of_a_byte_level_tokeniser_begin_with_a_space(tmp_path):
    """Else "film" of a list would have other tokens than "film" of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BertForTokenClassification

    from bara.data.tag_task import TagTask
    from bara.models.base import load_tokenizer

    text = Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    text.train_from_iterator(["a film , the film"] * 9, trainer)
    text.save(str(tmp_path / "tokenizer.json"))
    saved = json.loads(text.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(saved["vocab"]))
    merges = [" ".join(pair) for pair in saved["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    model = BertForTokenClassification(tiny_bert_config())
    tokenizer = load_tokenizer(str(tmp_path), model, words=True)
    table = Dataset.from_list([{"tokens": ["the", "film"], "tags": ["O", "B-X"]}])
    rows = TagTask.infer(table).inputs(table, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])
    assert "Ġfilm" in tokens


def test_labels_that_training_did_not_have_are_refused(trained, failing, tmp_path):
    folder, _ = trained("multi-label")
    table = write_jsonl(tmp_path / "t.jsonl", [{"text": "a film", "labels": ["new"]}])
    assert "'new'" in failing("evaluate", folder, "--data", table)
    folder, _ = trained("token-classification")
    table = write_jsonl(tmp_path / "u.jsonl", [{"tokens": ["a"], "tags": ["B-NEW"]}])
    assert "'B-NEW'" in failing("evaluate", folder, "--data", table)
    folder, _ = trained("question-answering")
    row = {"question": "is", "context": "it is", "answers": {"text": [], "answer_start": []}}
    table = write_jsonl(tmp_path / "v.jsonl", [asked()[0], row])
    assert "row 2 has no answer" in failing("evaluate", folder, "--data", table)


def test_a_task_file_of_before_still_loads(tmp_path):
    from bara.data.text_task import TextTask
    from bara.finetuning.task_inputs import load_task

    saved = {
        "text_column": "text",
        "label_column": "label",
        "text_pair_column": None,
        "task": "classification",
        "label_names": ["neg", "pos"],
        "max_length": 64,
        "target_mean": 0.0,
        "target_std": 1.0,
    }
    (tmp_path / "text_task.json").write_text(json.dumps(saved))
    task = load_task(tmp_path)
    assert type(task) is TextTask
    assert task == TextTask(label_names=("neg", "pos"), max_length=64)
