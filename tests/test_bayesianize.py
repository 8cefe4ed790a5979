"""`bara bayesianize`: adapters that PEFT alone made, and what the commands do with the result."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import bara
from bara import BaraError
from bara.language.evaluation import token_metrics
from bara.language.tasks import LanguageTask
from bara.methods import tfb
from conftest import write_jsonl
from helpers import adapt, stir
from language_models import tiny_lm, word_tokenizer, words

TEXTS = [{"prompt": words(i, 5) + " ", "completion": words(6, 7)} for i in range(10, 30)]
UNEVEN = {"rank_pattern": {"0.self_attn.v_proj": 2}, "alpha_pattern": {"q_proj": 3}}


def plain(base, folder, options, tokenizer=None, scale=0.3):
    """A trained LoRA adapter's folder, as a trainer elsewhere leaves it."""
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options))
    stir(model, scale)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def lm(tmp_path):
    """A base model's folder, and an adapter of uneven ranks on it."""
    base = tmp_path / "base"
    tiny_lm("llama").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    model = tiny_lm("llama")
    model.name_or_path = str(base)
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **UNEVEN}
    return base, plain(model, tmp_path / "lora", options), tmp_path / "lora"


def test_a_language_model_from_elsewhere(lm, tmp_path, run):
    _, original, folder = lm
    texts = [{"prompt": p, "completion": greedy(original, p)} for p in (t["prompt"] for t in TEXTS)]
    table = write_jsonl(tmp_path / "texts.jsonl", texts)
    out = tmp_path / "posterior"
    printed = run(
        "bayesianize", folder, "--data", table, "--output", out, "--set", "tolerance=0.02"
    )
    assert "tfb on 20 rows: noise of size" in printed
    model, tokenizer, task = bara.load_adapter(out)
    assert task == LanguageTask("causal-lm", max_length=64)
    saved, loaded = load_file(folder / "adapter_model.safetensors"), model.state_dict()
    for key, tensor in saved.items():  # the mean is the adapter
        name = key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        assert torch.equal(loaded[name], tensor)

    # the loss under the mixture, from its definition, is what the tolerance allows and no more
    inputs = task.inputs(Dataset.from_list(texts), tokenizer)
    mixture, bare = mixture_nll(model, inputs, 10), mixture_nll(model, inputs, None)
    assert token_metrics(original, inputs)["nll"] == pytest.approx(bare, rel=1e-4)
    assert mixture <= 1.02 * bare + 1e-5
    assert mixture == pytest.approx(1.02 * bare, rel=0.02)  # eight bisections
    assert f"{bare:.4f}" in printed
    assert f"{mixture:.4f}" in printed

    numbers = tmp_path / "numbers.json"
    run("evaluate", out, "--data", table, "--json", numbers)
    assert json.loads(numbers.read_text())["metrics"]["nll"] == pytest.approx(mixture, rel=1e-4)
    record = json.loads(run("generate", out, TEXTS[0]["prompt"], "--max-new-tokens", 3))
    assert record["epistemic"] > 0
    assert len(record["answers"]) == 8


def greedy(model, prompt):
    """Four words that the adapter finds likely, so that noise costs likelihood."""
    ids = torch.tensor([word_tokenizer()(prompt)["input_ids"]])
    with torch.no_grad():
        for _ in range(4):
            likely = model(input_ids=ids).logits[:, -1, 3:].argmax(-1, keepdim=True) + 3
            ids = torch.cat([ids, likely], dim=1)
    return words(*ids[0, -4:].tolist())


def mixture_nll(model, inputs, num_draws):
    """One text and one draw at a time, without a batch."""
    total, tokens = 0.0, 0
    for row in inputs:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        parts = []
        for d in range(num_draws or 1):
            with torch.no_grad():
                if num_draws is None:
                    logits = model(input_ids=ids).logits[0, :-1]
                else:
                    with bara.sampling(model, seed=0, first_draw=d):
                        logits = model(input_ids=ids).logits[0, :-1]
            known = labels != -100
            parts.append(logits[known].log_softmax(-1)[range(int(known.sum())), labels[known]])
        total -= (torch.stack(parts).logsumexp(0) - math.log(len(parts))).sum().item()
        tokens += int((labels != -100).sum())
    return total / tokens


def test_multiple_choice(lm, tmp_path, run):
    _, _, folder = lm
    rows = [
        {"question": words(i), "choices": [words(i + 1), words(6), words(4)], "answer": i % 3}
        for i in range(10, 30)
    ]
    table, out = write_jsonl(tmp_path / "questions.jsonl", rows), tmp_path / "posterior"
    options = ["--task", "multiple-choice", "--set", "num_anchors=12"]
    printed = run("bayesianize", folder, "--data", table, "--output", out, *options)
    assert "tfb on 12 rows" in printed
    predicted = run("predict", out, "--data", table, "--num-draws", 3)
    assert len(predicted.splitlines()) == 20


def classifier_folder(tiny_bert, tiny_model_dir, folder, **options):
    tiny_bert.name_or_path = str(tiny_model_dir)
    options = {"target_modules": ["query"], "task_type": "SEQ_CLS", **options}
    return plain(tiny_bert, folder, options)


LABELLED = [
    {"text": t, "label": i % 3} for i, t in enumerate(["a film", "bad food", "the plot"] * 8)
]


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "num_anchors=16"],
        ["--method", "laplace", "--set", "structure=diag"],
        ["--method", "laplace", "--set", "subset=last-layer"],
    ],
)
def test_classifiers(options, tiny_bert, tiny_model_dir, tmp_path, run):
    if "laplace" in options:
        pytest.importorskip("laplace")
    original = classifier_folder(tiny_bert, tiny_model_dir, tmp_path / "lora")
    table, out = write_jsonl(tmp_path / "texts.jsonl", LABELLED), tmp_path / "posterior"
    run("bayesianize", tmp_path / "lora", "--data", table, "--output", out, *options)
    model, tokenizer, task = bara.load_adapter(out)
    assert task.label_names == ("0", "1", "2")
    batch = dict(tokenizer(["a film", "the plot"], padding=True, return_tensors="pt"))
    mean = bara.predict(model, batch, deterministic=True)
    with torch.no_grad():
        expected = original(**batch).logits.softmax(-1)
    torch.testing.assert_close(mean.probs, expected)
    assert bara.predict(model, batch, num_draws=20).log_probs_draws.std(0).min() > 0
    if "laplace" not in options:  # the same as the function on a model in memory
        rows = Dataset.from_list(LABELLED).shuffle(seed=0).select(range(16))
        data = [{**tokenizer(r["text"]), "labels": r["label"]} for r in rows]
        tfb(original, data)
        ours = bara.predict(model, batch, num_draws=4)
        torch.testing.assert_close(
            ours.log_probs_draws, bara.predict(original, batch, num_draws=4).log_probs_draws
        )
    assert "accuracy" in run("evaluate", out, "--data", table, "--num-draws", 4)


def test_classes_need_their_order(tiny_bert, tiny_model_dir, tmp_path, run, failing):
    classifier_folder(tiny_bert, tiny_model_dir, tmp_path / "lora")
    named = [{**row, "label": "abc"[row["label"]]} for row in LABELLED]
    table = write_jsonl(tmp_path / "texts.jsonl", named)
    command = ["bayesianize", tmp_path / "lora", "--data", table, "--output", tmp_path / "out"]
    assert "Name the 3 classes in the order" in failing(*command)
    assert "has 3 outputs" in failing(*command, "--labels", "a,b")
    run(*command, "--labels", "c, a, b")
    assert bara.load_adapter(tmp_path / "out")[2].label_names == ("c", "a", "b")
    five = write_jsonl(
        tmp_path / "five.jsonl", [{**r, "label": i % 5} for i, r in enumerate(LABELLED)]
    )
    command[3] = five
    assert "outputs are 0 to 2" in failing(*command, "--force")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora set"),
        ({"init_lora_weights": "pissa"}, "changes the base model's weights"),
        ({"bias": "lora_only"}, "also trained biases"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication set"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices set"),
    ],
)
def test_what_is_no_plain_lora_is_refused(options, message, lm, tmp_path, failing):
    base, _, _ = lm
    model = tiny_lm("llama")
    model.name_or_path = str(base)
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    plain(model, tmp_path / "other", options)
    table = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    command = ["bayesianize", tmp_path / "other", "--data", table, "--output", tmp_path / "out"]
    assert message in failing(*command)
    assert not (tmp_path / "out").exists()


def test_other_refusals(lm, tmp_path, failing):
    base, _, folder = lm
    table = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    rest = ["--data", table, "--output", tmp_path / "out"]
    model = tiny_lm("llama")
    names = ["q_proj", "v_proj"]
    adapt(model, target_modules=names).save_pretrained(tmp_path / "bayesian")
    assert "has a posterior already" in failing("bayesianize", tmp_path / "bayesian", *rest)
    get_peft_model(tiny_lm("llama"), IA3Config(task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "ia3"
    )
    assert "is of the method IA3" in failing("bayesianize", tmp_path / "ia3", *rest)
    assert "generates no text" in failing("bayesianize", folder, *rest, "--method", "laplace")
    assert "tfb or laplace" in failing("bayesianize", folder, *rest, "--method", "bara")
    assert "did you mean 'tolerance'" in failing(
        "bayesianize", folder, *rest, "--set", "toleranc=1"
    )
    assert "is the adapter itself" in failing(
        "bayesianize", folder, "--data", table, "--output", folder
    )
    wider = tmp_path / "wider"
    tiny_lm("gpt2").save_pretrained(wider)
    assert "does not fit" in failing("bayesianize", folder, *rest, "--base-model", wider)
    new = get_peft_model(tiny_lm("llama"), LoraConfig(target_modules=names, task_type="CAUSAL_LM"))
    new.peft_config["default"].base_model_name_or_path = str(base)
    new.save_pretrained(tmp_path / "new")
    assert "was not trained" in failing("bayesianize", tmp_path / "new", *rest)
    with pytest.raises(BaraError, match="is not empty"):
        bara.bayesianize(folder, str(table), base)


def test_without_a_saved_head_the_base_models_counts(tiny_model_dir, tmp_path):
    """An adapter whose head is the base model's own is refused: PEFT saves one with SEQ_CLS."""
    base = BertForSequenceClassification.from_pretrained(tiny_model_dir)
    model = plain(base, tmp_path / "lora", {"target_modules": ["query"]})  # no task type
    rows = Dataset.from_list(LABELLED)
    with pytest.raises(BaraError, match="give --task classification"):
        bara.bayesianize(tmp_path / "lora", rows, tmp_path / "out", base_model=str(tiny_model_dir))
    with pytest.raises(BaraError, match="does not fit the base model"):
        bara.bayesianize(
            tmp_path / "lora",
            rows,
            tmp_path / "out",
            task="classification",
            base_model=str(tiny_model_dir),
        )
    assert model.peft_config["default"].task_type is None
