"""Tiny models, made from a configuration in milliseconds."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # where kernels run (tests/test_kernels.py); read when Triton is imported, which PEFT may do
    os.environ["TRITON_INTERPRET"] = "1"

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from bara.cli import main

WORDS = "a the it is was not film plot food good great fine bad awful poor warm cold . , !"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(" ")]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> BertTokenizerFast:
    """A WordPiece tokeniser with a few English words."""
    wordpiece = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.post_processor = processors.BertProcessing(
        ("[SEP]", VOCABULARY.index("[SEP]")), ("[CLS]", VOCABULARY.index("[CLS]"))
    )
    return BertTokenizerFast(tokenizer_object=wordpiece, model_max_length=64)


def tiny_bert_config(**options: object) -> BertConfig:
    """2 layers of width 32 over the tiny vocabulary."""
    return BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        **options,
    )


@pytest.fixture
def tiny_bert() -> BertForSequenceClassification:
    """A classifier of 3 classes with 2 layers of width 32; its weights are always the same."""
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_bert_config(num_labels=3))


@pytest.fixture
def tiny_model_dir(
    tmp_path: Path, tiny_bert: BertForSequenceClassification, tiny_tokenizer: BertTokenizerFast
) -> Path:
    """A folder with the tiny classifier and its tokeniser."""
    folder = tmp_path / "tiny-bert"
    tiny_bert.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def next_commands(printed: str) -> list[list[str]]:
    """The commands under "Next:", which comes last, without their first word, `bara`."""
    _, _, after = printed.partition("Next:\n")
    assert after
    assert all(line.startswith("  bara ") for line in after.splitlines())
    return [shlex.split(line)[1:] for line in after.splitlines()]


@pytest.fixture
def terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """Standard error is a terminal; returns what was shown there since the last call."""
    # pytest makes a new stream when the test begins
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    return lambda: capsys.readouterr().err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command; returns its exit status and what it wrote to standard output and error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def run(call: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Run a command that must succeed; returns its standard output."""

    def run(*arguments: object) -> str:
        code, output, error = call(*arguments)
        assert code == 0, error
        return output

    return run


@pytest.fixture
def failing(call: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Run a command that must fail with one line on standard error; returns that line."""

    def run(*arguments: object) -> str:
        code, _, error = call(*arguments)
        assert code != 0
        assert error.startswith("bara: error: ")
        assert error.count("\n") == 1
        assert "unexpected" not in error
        return error

    return run


@pytest.fixture(scope="session")
def served_folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: BertTokenizerFast
) -> dict[str, Path]:
    """Folders of tiny adapters to serve, by their name: see `serving.TABLES`."""
    from serving import TABLES, make_adapter, tiny_bert_folder, tiny_lm_folder

    root = tmp_path_factory.mktemp("served")
    bert = tiny_bert_folder(root / "bert", tiny_tokenizer)
    llama = tiny_lm_folder(root / "llama")
    return {
        name: make_adapter(llama if name == "words" else bert, root / name, name) for name in TABLES
    }


@pytest.fixture(scope="session")
def task_folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: BertTokenizerFast
) -> dict[str, Path]:
    """The same for labels, tags and answers: see `serving.TASK_TABLES`."""
    from serving import TASK_TABLES, make_adapter, tiny_bert_folder

    root = tmp_path_factory.mktemp("tasks")
    bert = tiny_bert_folder(root / "bert", tiny_tokenizer)
    return {name: make_adapter(bert, root / name, name) for name in TASK_TABLES}
