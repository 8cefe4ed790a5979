"""transformers' own ways to load an adapter's folder, with `bara` imported."""

import pytest
import torch
import transformers
from packaging.version import Version
from peft.utils.other import ModulesToSaveWrapper
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    pipeline,
)

import bara
from bara import BaraError
from conftest import tiny_bert_config, write_jsonl
from encoder_decoders import tiny_seq2seq
from helpers import adapt, stir
from language_models import tiny_lm, word_tokenizer, words

HEADS = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="reads no heads of adapters"
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


@HEADS
def test_classes_that_the_base_model_does_not_have(tmp_path, tiny_tokenizer):
    """An ordinary encoder has 2 by its configuration; transformers is told otherwise."""
    torch.manual_seed(0)
    BertModel(tiny_bert_config()).save_pretrained(tmp_path / "base")
    names = {0: "x", 1: "y", 2: "z"}
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base", id2label=names)
    options = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    model, folder = stir(adapt(base, **options)).eval(), tmp_path / "adapter"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    batch = dict(tiny_tokenizer(TEXTS, padding=True, return_tensors="pt"))
    probs = bara.predict(model, batch, deterministic=True).probs
    # whose tokeniser would be the base model's
    options = {"model_kwargs": {"id2label": names}, "tokenizer": str(folder), "device": "cpu"}
    classify = pipeline("text-classification", model=str(folder), **options)
    for answer, row in zip(classify(TEXTS, top_k=None), probs, strict=True):
        found = {one["label"]: one["score"] for one in answer}
        assert found == pytest.approx(dict(zip("xyz", row.tolist(), strict=True)), rel=1e-4)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(folder)


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


def token_classifier():
    return BertForTokenClassification(tiny_bert_config(num_labels=3))


def question_answerer():
    return BertForQuestionAnswering(tiny_bert_config())


def t5():
    return tiny_seq2seq("t5")


IDS = torch.randint(5, 20, (3, 7), generator=torch.Generator().manual_seed(0))
DECODED = {"decoder_input_ids": IDS[:, :4]}


@pytest.mark.parametrize(
    ("task_type", "auto", "make", "targets", "more"),
    [
        pytest.param(
            "TOKEN_CLS",
            AutoModelForTokenClassification,
            token_classifier,
            ["query", "value"],
            {},
            marks=HEADS,
        ),
        pytest.param(
            "QUESTION_ANS",
            AutoModelForQuestionAnswering,
            question_answerer,
            ["query", "value"],
            {},
            marks=HEADS,
        ),
        ("SEQ_2_SEQ_LM", AutoModelForSeq2SeqLM, t5, ["q", "v"], DECODED),
    ],
)
def test_auto_models_of_other_tasks(task_type, auto, make, targets, more, tmp_path):
    """By the posterior mean and under draws."""
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    base = type(make()).from_pretrained(tmp_path / "base")
    model = stir(adapt(base, target_modules=targets, task_type=task_type)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter").eval()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **more}

    def logits(model):
        with torch.no_grad():
            outputs = model(**batch)
        found = [value for name, value in outputs.items() if name.endswith("logits")]
        return torch.stack(found)

    expected = logits(model)
    torch.testing.assert_close(logits(loaded), expected)
    drawn = []
    for one in (model, loaded):
        with bara.sampling(one, seed=1):
            drawn.append(logits(one))
    torch.testing.assert_close(drawn[1], drawn[0])
    assert not torch.allclose(drawn[0], expected, atol=1e-3)


def test_a_head_that_transformers_leaves_random_is_refused(classifier, monkeypatch):
    """5.16 and 5.17 do; later ones ask PEFT's wrapper of the head where to put it."""
    monkeypatch.setattr(ModulesToSaveWrapper, "adapter_state_dict_load_map", lambda *_: {})
    model = AutoModelForSequenceClassification.from_pretrained(classifier, num_labels=3)
    batch = dict(
        AutoTokenizer.from_pretrained(classifier)(TEXTS, padding=True, return_tensors="pt")
    )
    for _ in range(2):
        with pytest.raises(BaraError, match=r"did not read classifier\.modules_to_save\.default"):
            model.to(torch.float64)(**batch)
    with pytest.raises(BaraError, match=r"load the adapter with bara\.load_adapter"):
        bara.predict(model, batch)
    ours = bara.load_adapter(classifier)[0]  # whoever reads it in some other way may go on
    head = model.classifier.modules_to_save["default"]
    head.load_state_dict(ours.get_base_model().classifier.modules_to_save["default"].state_dict())
    found, expected = (bara.predict(one, batch, deterministic=True) for one in (model, ours))
    torch.testing.assert_close(found.probs.float(), expected.probs, rtol=1e-4, atol=1e-5)
