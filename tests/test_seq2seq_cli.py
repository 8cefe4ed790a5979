"""bara train, evaluate and generate for models with an encoder, end to end on tiny ones."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import bara
from bara.finetuning.load import load_adapter
from bara.language.tasks import LanguageTask
from conftest import write_jsonl
from encoder_decoders import ending_tokenizer, tiny_seq2seq
from language_models import tiny_lm, words

ROWS = [{"prompt": words(i, 5), "completion": words(6, 7 + i % 2)} for i in range(10, 30)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in ("t5", "bart")}
    for name, folder in folders.items():
        tiny_seq2seq(name).save_pretrained(folder)
        ending_tokenizer().save_pretrained(folder)
    return folders


@pytest.fixture
def base(bases):
    return bases["t5"]


def test_an_adapter_learns_answers_and_abstains(base, tmp_path, run, failing):
    table = write_jsonl(tmp_path / "table.jsonl", ROWS)
    out, numbers = tmp_path / "adapter", tmp_path / "numbers.json"
    free = "method_options={kl_weight: 0, local_kl_weight: 0}"
    train = ["train", "--model", base, "--task", "seq2seq", "--data", table, "--output", out]
    shown = run(*train, "--epochs", 10, "--learning-rate", 0.03, "--batch-size", 10, "--set", free)
    assert f"bara generate {out}" in shown
    options = ["--num-draws", 4, "--max-new-tokens", 4]
    calibrate = ["--calibrate-risk", 0.4, "--calibrate-delta", 0.2]
    run("evaluate", out, "--data", table, "--json", numbers, *calibrate, *options)
    metrics = json.loads(numbers.read_text("utf-8"))["metrics"]
    assert metrics["nll"] < 0.5 * math.log(64)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]))

    model, tokenizer, task = load_adapter(out)
    assert task.task == "seq2seq"
    assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    (answer,) = bara.generate(model, tokenizer, ROWS[0]["prompt"], num_draws=4, max_new_tokens=4)
    record = json.loads(run("generate", out, ROWS[0]["prompt"], *options))
    assert record["text"] == answer.text
    assert record["answers"] == list(answer.answers)
    asked = ["generate", out, "--data", table, "--no-agreement"]
    lines = run(*asked, "--abstain-at-risk", 0.4, *options).splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == len(ROWS)
    assert all((r["text"] is None) == r["abstained"] for r in records)
    card = (out / "README.md").read_text("utf-8")
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card
    assert "bara.predict(" not in card.partition("## How to load it")[2].partition("```\n")[0]
    refused = "this adapter was trained for seq2seq: use `bara generate`"
    assert refused in failing("certify", out, "--data", table)
    assert "takes a text as its prompt" in failing("generate", out, "--chat", "w4", *options)


def test_predict_writes_the_answers_of_generate(base, tmp_path, run, failing):
    table = write_jsonl(tmp_path / "table.jsonl", ROWS)
    out, few = tmp_path / "adapter", write_jsonl(tmp_path / "few.jsonl", ROWS[:3])
    train = ["train", "--model", base, "--task", "seq2seq", "--data", table, "--output", out]
    run(*train, "--set", "training.max_steps=1")
    asked = ["--data", few, "--num-draws", 3, "--seed", 2]
    lines = run("predict", out, *asked).splitlines()
    assert lines == run("generate", out, *asked).splitlines()
    assert len(lines) == 3
    assert len(json.loads(lines[0])["answers"]) == 3
    run("predict", out, *asked, "--output", tmp_path / "answers.jsonl")
    assert (tmp_path / "answers.jsonl").read_text("utf-8").splitlines() == lines
    assert "has no threshold" in failing("predict", out, *asked, "--abstain-at-risk", 0.1)
    assert "--coverage is not for adapters that write" in failing(
        "predict", out, *asked, "--coverage", 0.9
    )
    folder = ["--executor", "local", "--output", tmp_path / "folder"]
    assert "use `bara generate`" in failing("predict", out, "--data", few, *folder)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_full_fine_tuning_loads(bases, name, tmp_path, run):
    base = bases[name]
    table = write_jsonl(tmp_path / "table.jsonl", ROWS)
    out = tmp_path / "model"
    train = ["train", "--model", base, "--task", "seq2seq", "--data", table, "--output", out]
    run(*train, "--method", "full", "--epochs", 1)
    model, _, task = load_adapter(out)
    assert task == LanguageTask("seq2seq", max_length=32 if name == "bart" else 128)
    saved, weights = load_file(out / "model.safetensors"), model.state_dict()
    assert all(torch.equal(weights[name].cpu(), tensor) for name, tensor in saved.items())
    run("generate", out, "w4 w5", "--max-new-tokens", 3)


def test_what_cannot_be_trained(base, tmp_path, failing):
    decoder = tmp_path / "decoder"
    tiny_lm("llama").save_pretrained(decoder)
    ending_tokenizer().save_pretrained(decoder)
    table = write_jsonl(tmp_path / "table.jsonl", ROWS)
    task = ["--task", "seq2seq", "--data", table, "--output", tmp_path / "out"]
    assert "cannot load the base model" in failing("train", "--model", decoder, *task)
    assert "which model?" in failing("train", *task)
    tempered = ["--method", "bara+temperature", "--validation", table]
    assert "which seq2seq does not predict" in failing("train", "--model", base, *task, *tempered)
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"text": "w4", "target": "w5"}])
    wrong = ["--task", "seq2seq", "--data", bare, "--output", tmp_path / "out"]
    error = failing("train", "--model", base, *wrong)
    assert "row 1: give texts under 'prompt' and 'completion'" in error
