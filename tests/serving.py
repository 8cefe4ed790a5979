"""Adapters to serve, and servers of the tests' own on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from datasets import Dataset
from transformers import BertForSequenceClassification

import bara
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.methods.recipe import TrainRecipe
from bara.serving import prediction
from conftest import tiny_bert_config
from helpers import CONFIGS, stir
from language_models import tiny_lm, word_tokenizer, words

CHAT = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w9 {% endif %}"
)
TEXTS = ["good film", "a bad plot , poor food", "it was not great !", "the cold was awful ."]
TABLES: dict[str, dict[str, list[Any]]] = {
    "reviews": {"text": TEXTS * 3, "label": ["yes", "no", "no"] * 4},
    "pairs": {"text": TEXTS * 3, "text_pair": TEXTS[::-1] * 3, "label": ["a", "b", "c"] * 4},
    "stars": {"text": TEXTS * 3, "label": [0.5, 1.5, 2.5, 4.0] * 3},
    "words": {"prompt": [words(i, 5) + " " for i in range(10, 22)], "completion": [words(6)] * 12},
}
_CONTEXT = "it was cold . the film is {} . it is not warm , not a good plot"
_ANSWER = {"text": ["great"], "answer_start": [_CONTEXT.index("{}")]}
TASK_TABLES: dict[str, dict[str, list[Any]]] = {
    "labels": {"text": TEXTS * 3, "labels": [["praise"], ["film", "praise"], [], ["film"]] * 3},
    "tags": {
        "tokens": [text.split() for text in TEXTS] * 3,
        "tags": [["O", *["B"] * (len(text.split()) - 1)] for text in TEXTS] * 3,
    },
    "answers": {
        "question": ["the film is", "the plot is"] * 6,
        "context": [_CONTEXT.format("great")] * 12,
        "answers": [_ANSWER, {"text": [], "answer_start": []}] * 6,
    },
}
RECIPES: dict[str, dict[str, Any]] = {
    "words": {"task": "causal-lm"},
    "labels": {"task": "multi-label"},
    "tags": {"task": "token-classification"},
    "answers": {"task": "question-answering", "max_length": 16, "stride": 4},
}


def held_predictions(
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[threading.Event, threading.Event, list[int]]:
    """Has servers wait before they predict.

    Returns:
        What is set when one has begun, what lets them go on, and the rows of every call so far.
    """
    begun, go, sizes = threading.Event(), threading.Event(), []

    def slow(model: Any, rows: Any, **options: Any) -> Any:
        sizes.append(len(rows))
        begun.set()
        assert go.wait(20)
        return bara.predict(model, rows, **options)

    monkeypatch.setattr(prediction, "predict", slow)
    return begun, go, sizes


def make_adapter(base: Path, folder: Path, kind: str, method: str = "bara", **options: Any) -> Path:
    """A trained adapter's folder, its parameters moved so that draws make a difference."""
    recipe = TrainRecipe(
        model=str(base),
        output=str(folder),
        method=method,
        method_options={"r": 2} | ({"weight_noise": 1.0} if method == "bara" else {}) | options,
        **RECIPES.get(kind, {}),
        training={"max_steps": 1, "save_strategy": "no", "use_cpu": True},
    )
    finetune(recipe, Dataset.from_dict((TABLES | TASK_TABLES)[kind]))
    if method in CONFIGS:
        model, _, _ = load_adapter(folder)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        stir(model, seed=len(kind)).save_pretrained(folder)
    return folder


def tiny_bert_folder(folder: Path, tokenizer: Any) -> Path:
    """A base classifier and its tokeniser; its weights are large, so that texts differ."""
    torch.manual_seed(0)
    config = tiny_bert_config(num_labels=3, initializer_range=0.3)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_lm_folder(folder: Path) -> Path:
    """A base language model and its tokeniser, with a chat template."""
    tiny_lm("llama").save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of a server on loopback, which ends with the context."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
