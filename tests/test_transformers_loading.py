"""transformers' own ways to load an adapter's folder, with `bara` imported."""

from importlib.metadata import version

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import bara
from conftest import write_jsonl
from helpers import adapt, stir
from language_models import tiny_lm, word_tokenizer, words

HEADS = pytest.mark.skipif(
    version("transformers") < "5.24", reason="leaves heads of adapters random: docs/limits.md"
)
TEXTS = ["the film was great", "bad food", "a plot"]


@pytest.fixture
def classifier(tiny_model_dir, tmp_path, run):
    """A folder of `bara train`, with classes that have names."""
    rows = [{"text": t, "label": "xyz"[i % 3]} for i, t in enumerate(TEXTS * 4)]
    table = write_jsonl(tmp_path / "table.jsonl", rows)
    out = tmp_path / "adapter"
    options = ["--epochs", 2, "--learning-rate", 0.01, "--set", "method_options.warmup=0.1"]
    run("train", "--model", tiny_model_dir, "--data", table, "--output", out, *options)
    return out


@pytest.fixture
def language(tmp_path):
    base, out = tmp_path / "base", tmp_path / "adapter"
    tiny_lm("llama").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    model = tiny_lm("llama")
    model.name_or_path = str(base)
    model = stir(adapt(model, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(out)
    word_tokenizer().save_pretrained(out)
    return model.eval(), out


@HEADS
def test_auto_model_for_sequence_classification(classifier):
    model = AutoModelForSequenceClassification.from_pretrained(classifier, num_labels=3).eval()
    ours, tokenizer, _ = bara.load_adapter(classifier)
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    expected = bara.predict(ours, batch, deterministic=True).probs
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits.softmax(-1), expected)
    draws = bara.predict(model, batch, num_draws=3, seed=1)
    theirs = bara.predict(ours, batch, num_draws=3, seed=1)
    torch.testing.assert_close(draws.log_probs_draws, theirs.log_probs_draws)
    assert draws.log_probs_draws.std(0).max() > 0


@HEADS
def test_text_classification_pipeline(classifier):
    """The folder alone has the classes of the base model's configuration; given ones have names."""
    ours, tokenizer, task = bara.load_adapter(classifier)
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    probs = bara.predict(ours, batch, deterministic=True).probs
    named = AutoModelForSequenceClassification.from_pretrained(
        classifier, id2label=dict(enumerate(task.label_names))
    )
    for names, options in (
        (["LABEL_0", "LABEL_1", "LABEL_2"], {"model": str(classifier)}),
        (["x", "y", "z"], {"model": named, "tokenizer": tokenizer}),
    ):
        classify = pipeline("text-classification", device="cpu", **options)
        for answer, row in zip(classify(TEXTS, top_k=None), probs, strict=True):
            found = {one["label"]: one["score"] for one in answer}
            assert found == pytest.approx(dict(zip(names, row.tolist(), strict=True)), rel=1e-4)


def test_auto_model_for_causal_lm_and_its_pipeline(language):
    model, folder = language
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(words(5, 9), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    say = pipeline("text-generation", model=str(folder), device="cpu")
    text = say(words(5, 9), max_new_tokens=4, do_sample=False)[0]["generated_text"]
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)[0]
    said = word_tokenizer().decode(plain, skip_special_tokens=True)
    assert text.replace(" ", "") == said.replace(" ", "")
