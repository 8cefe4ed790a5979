"""The classifier on a sentence encoder: what it computes, and its way through training and disk."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertModel

import bara
from bara.cli import main
from bara.data.tables import load_table
from bara.data.text_task import TextTask
from bara.finetuning.finetune import build_model
from bara.finetuning.load import load_adapter
from bara.finetuning.save import save_adapter
from bara.methods.recipe import TrainRecipe
from bara.methods.table import METHODS
from bara.models.base import load_base
from bara.models.sentence import SentenceClassifier, is_sentence_encoder
from conftest import VOCABULARY, tiny_bert_config, write_jsonl
from helpers import adapt, gradients, stir

TASK = TextTask(label_names=("neg", "pos"))


@pytest.fixture
def encoder_dir(tmp_path, tiny_tokenizer):
    """A folder as sentence-transformers writes it, around a tiny BERT."""
    torch.manual_seed(0)
    config = tiny_bert_config(
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    folder = tmp_path / "encoder"
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    write_pooling(folder, {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    return folder


def write_pooling(folder, content):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))


def inputs(rows=6, length=7):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(VOCABULARY), (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_sentence_encoders_are_recognised_by_their_pooling(encoder_dir, tiny_model_dir):
    assert is_sentence_encoder(str(encoder_dir))
    assert not is_sentence_encoder(str(tiny_model_dir))
    for content, expected in (
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, False),
        ({"embedding_dimension": 32, "pooling_mode": "mean"}, True),
        ({"embedding_dimension": 32, "pooling_mode": "cls"}, False),
    ):
        write_pooling(encoder_dir, content)
        assert is_sentence_encoder(str(encoder_dir)) is expected


def test_logits_are_the_linear_layer_of_the_mean_over_tokens(encoder_dir):
    model = SentenceClassifier.from_encoder(str(encoder_dir), num_labels=3).eval()
    stir(model.classifier)
    encoder = BertModel.from_pretrained(encoder_dir).eval()
    batch = inputs()
    hidden = encoder(**batch).last_hidden_state
    lengths = batch["attention_mask"].sum(1).tolist()
    means = torch.stack(
        [states[:length].mean(0) for states, length in zip(hidden, lengths, strict=True)]
    )
    expected = means @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(**batch).logits, expected)
    torch.testing.assert_close(model(**batch, return_dict=False)[0], expected)


def test_padding_does_not_matter(encoder_dir):
    model = SentenceClassifier.from_encoder(str(encoder_dir), num_labels=3).eval()
    batch = inputs()
    together = model(**batch).logits
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = model(input_ids=batch["input_ids"][row : row + 1, :length]).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-6)


def test_segments_of_text_pairs_are_used(encoder_dir):
    model = SentenceClassifier.from_encoder(str(encoder_dir), num_labels=3).eval()
    batch = inputs()
    segments = torch.ones_like(batch["input_ids"])
    # predict gives the model only what its signature names
    plain = bara.predict(model, dict(batch)).probs
    paired = bara.predict(model, {**batch, "token_type_ids": segments}).probs
    assert not torch.allclose(plain, paired)


@pytest.mark.parametrize("problem", ["classification", "regression"])
def test_micro_batches_with_num_items_add_up_to_the_mean(encoder_dir, problem):
    outputs = 3 if problem == "classification" else 1
    model = SentenceClassifier.from_encoder(str(encoder_dir), num_labels=outputs).eval()
    batch = inputs()
    if problem == "classification":
        labels = torch.tensor([0, 1, 2, 2, 1, 0])
        expected = nn.functional.cross_entropy(model(**batch).logits, labels)
    else:
        labels = torch.linspace(-1, 1, 6)
        expected = (model(**batch).logits.squeeze(1) - labels).square().mean()
    torch.testing.assert_close(model(**batch, labels=labels).loss, expected)
    parts = [
        model(
            **{name: tensor[rows] for name, tensor in batch.items()},
            labels=labels[rows],
            num_items_in_batch=6,
        ).loss
        for rows in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts), expected)


@pytest.mark.parametrize("method", ["bara", "balora"])
def test_gradient_checkpointing_changes_nothing(encoder_dir, method):
    batch = {**inputs(), "labels": torch.tensor([0, 1, 1, 0, 1, 0])}
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base, _ = load_base(str(encoder_dir), TASK, {})
        model = stir(adapt(base, method, task_type="SEQ_CLS", local_kl_weight=0.1), 0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            layers = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
            assert any(layer.gradient_checkpointing for layer in layers)
        torch.manual_seed(5)
        loss = model(**batch).loss
        loss.backward()
        found = gradients(model)
        assert any("classifier" in name for name in found)
        results.append((loss.detach(), found))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_low_precision_reaches_the_head(encoder_dir):
    base, modules = load_base(str(encoder_dir), TASK, {"dtype": "bfloat16"})
    assert modules == []
    assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}
    assert base(**inputs()).logits.dtype == torch.bfloat16


def test_incomplete_and_damaged_encoders_are_refused(encoder_dir):
    encoder = BertModel.from_pretrained(encoder_dir)
    state = {k: v for k, v in encoder.state_dict().items() if "layer.1" not in k}
    encoder.save_pretrained(encoder_dir, state_dict=state)
    with pytest.raises(bara.BaraError, match=r"lacks 16 of its weights .*encoder\.layer\.1"):
        load_base(str(encoder_dir), TASK, {})
    (encoder_dir / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(bara.BaraError, match="cannot load the base model"):
        load_base(str(encoder_dir), TASK, {})


@pytest.mark.parametrize("method", ["lora", "bara", "full"])
def test_a_saved_adapter_comes_back(encoder_dir, tmp_path, method):
    recipe = TrainRecipe(model=str(encoder_dir), method=method)
    torch.manual_seed(1)
    model, tokenizer = build_model(recipe, METHODS[recipe.method], TASK)
    stir(model)
    save_adapter(tmp_path / "adapter", model, tokenizer, TASK, recipe)
    torch.manual_seed(2)
    loaded, _, task = load_adapter(tmp_path / "adapter")
    assert task == TASK
    base = loaded if method == "full" else loaded.get_base_model()
    assert isinstance(base, SentenceClassifier)
    expected = bara.predict(model, inputs(), num_draws=3)
    rtol = 1e-6 if torch.cuda.is_available() else 0  # a GPU may add up in another order
    found = bara.predict(loaded, inputs(), num_draws=3)
    torch.testing.assert_close(found.probs, expected.probs, rtol=rtol, atol=0)


def test_a_fully_tuned_model_needs_no_base_and_must_be_whole(encoder_dir, tmp_path):
    recipe = TrainRecipe(model=str(encoder_dir), method="full")
    model, tokenizer = build_model(recipe, METHODS[recipe.method], TASK)
    save_adapter(tmp_path / "full", model, tokenizer, TASK, recipe)
    shutil.rmtree(encoder_dir)
    load_adapter(tmp_path / "full")
    weights = tmp_path / "full" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(bara.BaraError, match="incomplete or damaged"):
        load_adapter(tmp_path / "full")


def test_a_merged_adapter_can_be_saved(encoder_dir, tmp_path):
    recipe = TrainRecipe(model=str(encoder_dir), method="lora")
    model, _ = build_model(recipe, METHODS[recipe.method], TASK)
    stir(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged.encoder.save_pretrained(tmp_path / "encoder-only")
    encoder = BertModel.from_pretrained(tmp_path / "encoder-only")
    expected = merged.encoder(**inputs()).last_hidden_state
    torch.testing.assert_close(encoder(**inputs()).last_hidden_state, expected)


@pytest.mark.parametrize("max_length", [6, 100])
def test_a_merged_folder_cuts_texts_where_the_adapter_does(encoder_dir, tmp_path, run, max_length):
    """At the task's length, and where the tokeniser's is shorter (64) at that."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    file = encoder_dir / "sentence_bert_config.json"
    file.write_text('{"max_seq_length": 9, "do_lower_case": false}')  # of the base model
    recipe = TrainRecipe(model=str(encoder_dir), method="balora")
    task = replace(TASK, max_length=max_length)
    model, tokenizer = build_model(recipe, METHODS[recipe.method], task)
    save_adapter(tmp_path / "adapter", stir(model), tokenizer, task, recipe)
    merged = tmp_path / "merged"
    run("export", tmp_path / "adapter", "--mode", "merged", "--output", merged)
    text = "the film was great , a bad plot and cold food ! it is not good ."
    cut = tokenizer(text, truncation=True, max_length=min(64, max_length), return_tensors="pt")
    assert cut["input_ids"].shape[1] == (6 if max_length == 6 else 19)
    with torch.no_grad():
        expected = model.eval()(**cut).logits
    loaded = sentence_transformers.SentenceTransformer(str(merged), device="cpu")
    assert loaded.max_seq_length == min(64, max_length)
    found = torch.tensor(loaded.encode([text], show_progress_bar=False))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "bara"])
def test_train_evaluate_and_predict_commands(encoder_dir, tmp_path, capsys, method):
    rows = [
        {"text": f"the {noun} is {word}", "label": label}
        for label, words in (("pos", ("good", "great", "fine")), ("neg", ("bad", "awful", "poor")))
        for word in words
        for noun in ("film", "plot", "food")
    ]
    table = write_jsonl(tmp_path / "table.jsonl", rows)
    output, numbers = tmp_path / "out", tmp_path / "numbers.json"
    fit = ["--epochs", "20", "--batch-size", "6", "--learning-rate", "0.02"]
    calm = "kl_weight: 0, local_kl_weight: 0" + (", weight_noise: 0" if method == "bara" else "")
    no_prior = ["--set", f"method_options={{{calm}}}"]
    common = ["--data", str(table)]
    train = ["train", "--model", str(encoder_dir), "--output", str(output), "--method", method]
    assert main([*train, *common, *fit, *([] if method == "lora" else no_prior)]) == 0
    assert main(["evaluate", str(output), *common, "--json", str(numbers)]) == 0
    assert json.loads(numbers.read_text())["metrics"]["accuracy"] == 1.0
    capsys.readouterr()
    assert main(["predict", str(output), *common]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prediction"] for record in records] == [row["label"] for row in rows]
    model, tokenizer, task = load_adapter(output)
    here = bara.predict(model, task.inputs(load_table(table), tokenizer)).probs
    shown = torch.tensor([list(record["probabilities"].values()) for record in records])
    torch.testing.assert_close(shown, here, rtol=0, atol=1e-6)
