"""bara train, evaluate, predict and generate for language models, end to end on a tiny one."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

import bara
from bara import BaraError
from bara.adapter.layer import adapted_layers
from bara.cli import main
from bara.cli.generate import shade
from bara.finetuning.load import load_adapter
from bara.language.evaluation import token_metrics
from bara.language.prompts import encode_prompt
from bara.language.tasks import LanguageTask
from conftest import next_commands, write_jsonl
from language_models import adapted_lm, tiny_lm, word_tokenizer, words

CHAT = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w9 {% endif %}"
)
TEXTS = [{"prompt": words(i, 5) + " ", "completion": words(6, 7)} for i in range(10, 50)]
QUESTIONS = [
    {"question": words(i), "choices": [words(i + 1), words(6), words(4)], "answer": "B"}
    for i in range(10, 60)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_lm("llama").save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def run(capsys, *arguments, code=0):
    """What a command prints; for a failing one its one line on standard error."""
    capsys.readouterr()
    result = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert result == code, captured.err
    if code:
        assert captured.err.startswith("bara: error: ")
        assert captured.err.count("\n") == 1
        assert "unexpected" not in captured.err
        return captured.err
    return captured.out


def trained(capsys, base, tmp_path, task, rows, *more):
    table = write_jsonl(tmp_path / "table.jsonl", rows)
    out = tmp_path / "adapter"
    options = ["--epochs", 8, "--learning-rate", 0.03, "--batch-size", 10, *more]
    free = "kl_weight: 0, local_kl_weight: 0"
    if task == "multiple-choice" and "balora" not in more:
        free += ", factor_noise: false"  # without a KL nothing would keep it from growing
    options += ["--set", f"method_options={{{free}}}"]
    printed = run(
        capsys, "train", "--model", base, "--task", task, "--data", table, "--output", out, *options
    )
    return table, out, printed


def test_a_language_model_learns_answers_and_abstains(capsys, monkeypatch, base, tmp_path):
    table, out, printed = trained(capsys, base, tmp_path, "causal-lm", TEXTS)
    assert f"bara generate {out}" in printed
    numbers = tmp_path / "numbers.json"
    draws = ["--num-draws", 4]
    run(capsys, "evaluate", out, "--data", table, "--json", numbers, *draws)
    metrics = json.loads(numbers.read_text())["metrics"]
    assert metrics["nll"] < 0.5 * math.log(64)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]))

    model, tokenizer, task = load_adapter(out)
    assert task == LanguageTask("causal-lm", max_length=64)  # the context, below the default
    answers = bara.generate(model, tokenizer, [TEXTS[0]["prompt"]], num_draws=4, max_new_tokens=4)
    options = [*draws, "--max-new-tokens", 4]
    line = run(capsys, "generate", out, TEXTS[0]["prompt"], *options)
    record = json.loads(line)
    assert record["text"] == answers[0].text
    assert record["agreement"] == pytest.approx(answers[0].agreement)
    assert len(record["tokens"]) == len(answers[0].tokens)

    # a file, and JSONL in a pipe
    result = tmp_path / "answers.jsonl"
    run(capsys, "generate", out, "--data", table, "--output", result, "--no-agreement", *options)
    assert len(result.read_text().splitlines()) == len(TEXTS)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(TEXTS[0]) + "\n"))
    assert json.loads(run(capsys, "generate", out, *options))["text"] == answers[0].text

    # abstention: refused before calibration, honoured after
    refused = ["generate", out, "--data", table, "--abstain-at-risk", 0.3, *options]
    assert "has no threshold for the risk 0.3" in run(capsys, *refused, code=1)
    calibrate = ["--calibrate-risk", 0.3, "--calibrate-delta", 0.2]
    calibrated = run(capsys, "evaluate", out, "--data", table, *calibrate, *options)
    (after,) = next_commands(calibrated)  # under the same conditions, so that it is not refused
    assert after[:3] == ["generate", str(out), "PROMPT"]
    assert "abstained" in json.loads(run(capsys, *after[:2], TEXTS[0]["prompt"], *after[3:]))
    answered = run(capsys, *refused, "--output", result)
    assert next_commands(answered) == [["serve", str(out)]]
    records = [json.loads(line) for line in run(capsys, *refused).splitlines()]
    assert any(record["abstained"] for record in records)
    for record in records:
        said = [record["text"], record["answers"], *(t["text"] for t in record["tokens"])]
        assert all((text is None) == record["abstained"] for text in said)
    for other, differs in [
        (["--max-new-tokens", 9], "{'max_new_tokens': 9}"),
        (["--set", "do_sample=true"], "'do_sample': True"),
        (["--chat"], "chat = False, not True"),
    ]:
        assert differs in run(capsys, *refused, *other, code=1)
    twice = ["generate", out, "x", "--max-new-tokens", 3, "--set", "max_new_tokens=4"]
    assert "--max-new-tokens or --set" in run(capsys, *twice, code=1)
    assert "num_draws = 4, not 8" in run(
        capsys, "generate", out, "x", "--abstain-at-risk", 0.3, code=1
    )
    assert "measure = answers, not predictions" in run(
        capsys, "predict", out, "--data", table, "--abstain-at-risk", 0.3, *draws, code=1
    )


@pytest.mark.parametrize("task", ["causal-lm", "multiple-choice"])
def test_full_fine_tuning_of_a_language_model_loads(capsys, base, tmp_path, task):
    rows = TEXTS if task == "causal-lm" else QUESTIONS
    table = write_jsonl(tmp_path / "table.jsonl", rows)
    out = tmp_path / "model"
    options = ["--epochs", 1, "--method", "full", "--task", task, "--output", out]
    run(capsys, "train", "--model", base, "--data", table, *options)
    model, _, loaded = load_adapter(out)
    assert loaded.task == task
    saved = load_file(out / "model.safetensors")
    weights = model.state_dict()
    assert all(torch.equal(weights[name].cpu(), tensor) for name, tensor in saved.items())
    command = "generate" if task == "causal-lm" else "predict"
    answers = tmp_path / "answers.jsonl"
    run(capsys, command, out, "--data", table, "--output", answers)
    assert len(answers.read_text().splitlines()) == len(rows)


def test_a_threshold_does_not_outlive_its_weights(capsys, base, tmp_path):
    table, out, _ = trained(capsys, base, tmp_path, "multiple-choice", QUESTIONS)
    options = ["--data", table, "--num-draws", 3]
    run(capsys, "evaluate", out, *options, "--calibrate-risk", 0.4)
    run(capsys, "predict", out, *options, "--abstain-at-risk", 0.4)
    trained(capsys, base, tmp_path, "multiple-choice", QUESTIONS, "--overwrite")
    assert "has no threshold" in run(
        capsys, "predict", out, *options, "--abstain-at-risk", 0.4, code=1
    )
    assert "leave them out" in run(capsys, "evaluate", out, *options, "--max-new-tokens", 4, code=1)


def test_multiple_choice_trains_predicts_and_abstains(capsys, base, tmp_path):
    more = ["--scoring", "text", "--method", "balora"]
    table, out, printed = trained(capsys, base, tmp_path, "multiple-choice", QUESTIONS, *more)
    assert f"bara predict {out}" in printed
    model, tokenizer, _ = load_adapter(out)
    predictive = bara.multiple_choice(model, tokenizer, QUESTIONS, num_draws=3)
    assert (predictive.prediction == 1).float().mean() > 0.6
    options = ["--data", table, "--num-draws", 3]
    shown = run(capsys, "evaluate", out, *options, "--ood", table, "--calibrate-risk", 0.4)
    assert "accuracy" in shown
    assert "ood_auroc" in shown
    lines = run(capsys, "predict", out, *options, "--abstain-at-risk", 0.4).splitlines()
    assert len(lines) == len(QUESTIONS)
    for i, line in enumerate(lines):
        record = json.loads(line)
        assert record["probabilities"]["B"] == pytest.approx(
            float(predictive.probs[i, 1]), abs=1e-4
        )
        assert (record["prediction"] is None) == record["abstained"]


def test_a_question_without_its_answer_is_predicted_and_not_measured(capsys, base, tmp_path):
    _, out, _ = trained(capsys, base, tmp_path, "multiple-choice", QUESTIONS)
    rows = [*QUESTIONS[:2], {k: v for k, v in QUESTIONS[2].items() if k != "answer"}]
    command = ["--data", write_jsonl(tmp_path / "open.jsonl", rows), "--num-draws", 2]
    assert len(run(capsys, "predict", out, *command).splitlines()) == 3
    error = run(capsys, "evaluate", out, *command, code=1)
    assert "row 3 has no answer: fill in the column 'answer'" in error


def test_choices_are_scored_at_the_temperature_of_the_untrained_model(capsys, base, tmp_path):
    _, out, _ = trained(capsys, base, tmp_path, "multiple-choice", QUESTIONS)
    fitted = json.loads((out / "temperature.json").read_text())["temperature"]
    model, tokenizer, _ = load_adapter(out)
    assert model.config.predictive_temperature == fitted
    model.config.predictive_temperature = 1.0
    with model.disable_adapter():
        plain = bara.multiple_choice(model, tokenizer, QUESTIONS, deterministic=True)

    def nll(temperature):
        scores = plain.log_probs_draws[0] / temperature
        return torch.nn.functional.cross_entropy(scores, plain.labels).item()

    assert nll(fitted) <= min(nll(0.05 * 1.1**i) for i in range(63)) + 1e-6


def test_a_temperature_is_fitted_to_held_out_questions(capsys, base, tmp_path):
    table = write_jsonl(tmp_path / "validation.jsonl", QUESTIONS[::2])
    more = ["--method", "bara+temperature", "--validation", table]
    _, out, _ = trained(capsys, base, tmp_path, "multiple-choice", QUESTIONS, *more)
    fitted = json.loads((out / "temperature.json").read_text())["temperature"]
    model, tokenizer, _ = load_adapter(out)
    tempered = bara.multiple_choice(model, tokenizer, QUESTIONS[::2])
    model.config.predictive_temperature = 1.0
    plain = bara.multiple_choice(model, tokenizer, QUESTIONS[::2])
    assert fitted != pytest.approx(1, abs=0.01)
    expected = (plain.log_probs_draws / fitted).softmax(-1)
    torch.testing.assert_close(tempered.log_probs_draws.exp(), expected)

    def nll(temperature):
        probs = (plain.log_probs_draws / temperature).softmax(-1).mean(0)
        return -probs[:, 1].log().mean().item()

    assert nll(fitted) <= min(nll(0.05 * 1.1**i) for i in range(63)) + 1e-6


def merging_tokenizer(ends):
    """Single characters, "A" and "B" merged to one token; with `ends` every text gets an end."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "A", "B", "C", "AB"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("A", "B")]))
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("ends", [False, True])
def test_a_completion_is_whole_where_the_tokeniser_would_merge_it(ends):
    tokenizer = merging_tokenizer(ends)
    start = [1] * ends
    assert encode_prompt(tokenizer, "CA") == [*start, 5, 3]
    for prompt, completion, expected in [("CA", "BC", [4, 5]), ("C", "AB", [6])]:
        rows = LanguageTask("causal-lm").inputs(
            Dataset.from_list([{"prompt": prompt, "completion": completion}]), tokenizer
        )
        labels = [label for label in rows[0]["labels"] if label != -100]
        assert labels == [*expected, 2]
        given = encode_prompt(tokenizer, prompt)
        assert rows[0]["input_ids"] == given + labels
    rows = LanguageTask("causal-lm").inputs(Dataset.from_list([{"text": "AB"}]), tokenizer)
    assert rows[0]["labels"] == [*start, 6, 2]


def test_the_loss_is_on_the_completion_only():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    task = LanguageTask("causal-lm")
    talk = {
        "messages": [
            {"role": "user", "content": words(4)},
            {"role": "assistant", "content": words(6, 7)},
        ]
    }
    rows = task.inputs(Dataset.from_list([{"prompt": "w4 ", "completion": "w5 w6"}]), tokenizer)
    assert rows[0]["input_ids"] == [4, 5, 6, 2]
    assert rows[0]["labels"] == [-100, 5, 6, 2]
    with pytest.raises(BaraError, match="chat template does not keep the prompt"):
        task.inputs(Dataset.from_list([talk]), tokenizer)
    tokenizer.chat_template = CHAT.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}w9 {% endif %}{{ m['content'] }}"
    )
    rows = task.inputs(Dataset.from_list([talk]), tokenizer)
    assert rows[0]["input_ids"] == [4, 9, 6, 7]
    assert rows[0]["labels"] == [-100, -100, 6, 7]
    rows = task.inputs(Dataset.from_list([{"text": "w4 w5"}]), tokenizer)
    assert rows[0]["labels"] == rows[0]["input_ids"] == [4, 5, 2]
    question = Dataset.from_list([{**QUESTIONS[0], "answer": 2}])
    for scoring, labels in [("text", [4]), ("letter", [3])]:  # C is unknown: w3
        rows = LanguageTask("multiple-choice", scoring=scoring).inputs(question, tokenizer)
        assert [label for label in rows[0]["labels"] if label != -100] == labels


def test_token_metrics_against_explicit_draws():
    model, tokenizer = adapted_lm(), word_tokenizer()
    rows = LanguageTask("causal-lm").inputs(
        Dataset.from_list([*TEXTS[:5], {"prompt": "w9 w8 w7 ", "completion": "w6"}]), tokenizer
    )
    nll, count, right = 0.0, 0, 0
    for row in rows:
        probs = []
        for draw in range(3):
            with torch.no_grad(), bara.sampling(model, seed=1, first_draw=draw):
                probs.append(
                    model(input_ids=torch.tensor([row["input_ids"]])).logits[0].softmax(-1)
                )
        mixture = torch.stack(probs).mean(0)
        for t, label in enumerate(row["labels"]):
            if label != -100:
                nll -= math.log(mixture[t - 1, label])
                right += int(mixture[t - 1].argmax()) == label
                count += 1
    metrics = token_metrics(model, rows, num_draws=3, seed=1, batch_size=4)
    assert metrics["nll"] == pytest.approx(nll / count, rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(right / count)


def test_the_terminal_shades_and_talks(capsys, monkeypatch, base, tmp_path):
    _, out, _ = trained(capsys, base, tmp_path, "causal-lm", TEXTS[:12])

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    too_long = " ".join(["w12"] * 80)
    monkeypatch.setattr(sys, "stdin", Terminal(f"w12 w5\n{too_long}\nw12\n\n"))
    shown = run(capsys, "generate", out, "--max-new-tokens", 3, "--num-draws", 2)
    assert shown.count("uncertainty") == 2
    assert "The question is taken back" in " ".join(shown.split())
    assert shade(0.0) == ""
    assert shade(3.0) == shade(9.0) == "on rgb(210,30,30)"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w4"}, "row 2: give texts under 'prompt' and 'completion'"),
        (
            {"messages": [{"role": "user", "content": "w4"}]},
            "must end with one of the role 'assistant'",
        ),
        ({"messages": "w4"}, "row 2: 'messages' must be a list of objects"),
        ({"prompt": words(*[4] * 130), "completion": "w4"}, "raise that (--max-length"),
    ],
)
def test_bad_training_rows_are_one_line(capsys, base, tmp_path, row, message):
    table = write_jsonl(tmp_path / "bad.jsonl", [TEXTS[0], row])
    arguments = ["train", "--model", base, "--task", "causal-lm", "--data", table]
    assert message in run(capsys, *arguments, "--output", tmp_path / "o", code=1)


def test_other_bad_input_is_one_line(capsys, tmp_path, base, tiny_model_dir):
    table = write_jsonl(
        tmp_path / "t.jsonl", [{"text": "the film", "label": i % 2} for i in range(8)]
    )
    out = tmp_path / "classifier"
    run(capsys, "train", "--model", tiny_model_dir, "--data", table, "--output", out, "--epochs", 1)
    assert "cannot generate" in run(capsys, "generate", out, "the film", code=1)
    assert "a prompt or --data, not both" in run(
        capsys, "generate", out, "x", "--data", table, code=1
    )
    questions = write_jsonl(tmp_path / "q.jsonl", [{**QUESTIONS[0], "answer": "Z"}])
    train = ["train", "--model", base, "--task", "multiple-choice", "--data", questions]
    assert "no index from 0 to 2" in run(capsys, *train, "--output", tmp_path / "o", code=1)
    gguf = ["train", "--model", tmp_path / "no.gguf", "--task", "causal-lm", "--data", questions]
    assert "there is no file" in run(capsys, *gguf, "--output", tmp_path / "o", code=1)
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    gguf[2] = tmp_path / "bad.gguf"
    assert "cannot load the base model" in run(capsys, *gguf, "--output", tmp_path / "o", code=1)


def test_gates_of_an_export_are_averaged_over_texts(capsys, base, tmp_path):
    """What depends on the input needs `--data`, and nothing is measured: there are no classes."""
    table, out, _ = trained(capsys, base, tmp_path, "causal-lm", TEXTS)
    command = ["export", out, "--mode", "draws", "-n", 2, "--output", tmp_path / "draws"]
    assert "depends on the input" in run(capsys, *command, code=1)
    refused = run(capsys, *command, "--data", table, "--held-out", table, code=1)
    assert "--held-out is not for language models" in refused
    run(capsys, *command, "--data", table)
    manifest = json.loads((tmp_path / "draws" / "manifest.json").read_text())
    assert (manifest["task"], manifest["difference"]) == ("causal-lm", None)
    model, tokenizer, task = load_adapter(out)
    rows = task.inputs(Dataset.from_list(TEXTS), tokenizer)
    bara.export_lora(model, tmp_path / "again", mode="draws", num_draws=2, data=rows)
    for draw in ("draw-0", "draw-1"):
        both = [
            load_file(tmp_path / name / draw / "adapter_model.safetensors")
            for name in ("draws", "again")
        ]
        for name, tensor in both[0].items():
            torch.testing.assert_close(tensor, both[1][name])


@pytest.mark.parametrize(("task", "rows"), [("causal-lm", TEXTS), ("multiple-choice", QUESTIONS)])
def test_pruning_is_measured_at_the_labels(capsys, base, tmp_path, task, rows):
    table, out, _ = trained(capsys, base, tmp_path, task, rows, "--epochs", 1)
    model, tokenizer, loaded = load_adapter(out)
    for _, _, posterior in adapted_layers(model, "default"):
        posterior.global_logit.data[0] = -1.0
    model.save_pretrained(out)
    smaller = tmp_path / "smaller"
    options = ["--data", table, "--held-out", table, "--output", smaller, "--num-draws", 2]
    assert "factors removed" in run(capsys, "prune", out, *options, "--tolerance", 1)
    change = json.loads((smaller / "pruning.json").read_text())["change"]["mean"]
    pruned, _, _ = load_adapter(smaller)
    distances = []
    for row in loaded.inputs(Dataset.from_list(rows), tokenizer):
        ids = torch.tensor([row["input_ids"]])
        known = torch.tensor(row["labels"][1:]) != -100
        with torch.no_grad():
            probs = [m(ids).logits[0, :-1][known].softmax(-1) for m in (model, pruned)]
        distances.append(0.5 * (probs[0] - probs[1]).abs().sum(-1).mean().item())
    assert change["num_inputs"] == len(rows)
    assert change["mean"] == pytest.approx(sum(distances) / len(rows), rel=1e-3)
    strict = [*options, "--force", "--tolerance", change["mean"] / 2]
    assert "more than the tolerance" in run(capsys, "prune", out, *strict, code=1)
