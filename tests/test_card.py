"""The model card that comes with an adapter."""

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel

import bara
from bara import BaraError
from helpers import adapt, stir


@pytest.fixture
def model(tiny_bert):
    tiny_bert.config._name_or_path = tiny_bert.name_or_path = "tiny/bert"
    return stir(adapt(tiny_bert, task_type="SEQ_CLS"), 0.1).eval()


@pytest.fixture
def data():
    torch.manual_seed(0)
    ids = torch.randint(5, 20, (6, 4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(6) % 3}


def test_saving_writes_method_and_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "tiny/bert"
    assert {"bara", "transformers"} <= set(card.data.tags)
    for line in (
        "# BaRA adapter",
        "| r | 4 |",
        "import bara",
        'AutoModelForSequenceClassification.from_pretrained("tiny/bert")',
        "bara export FOLDER --mode mean",
    ):
        assert line in card.text
    assert "# Model Card for Model ID" in card.text  # PEFT's own part


def test_balora_and_a_second_adapter_have_their_own(tiny_bert, tmp_path):
    model = adapt(tiny_bert, "balora", task_type="SEQ_CLS")
    model.add_adapter("other", bara.BaloraConfig(r=2, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    assert "| r | 4 |" in (tmp_path / "README.md").read_text()
    other = (tmp_path / "other" / "README.md").read_text()
    assert "# BaLoRA adapter" in other
    assert "| r | 2 |" in other


def test_measurements_are_added_replaced_and_removed(model, data, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nMy own words: 50 % $x$ \\1.\n")
    evaluation = bara.evaluate(model, data, num_draws=2)
    rank = bara.effective_rank(model, data, num_draws=3)
    bara.write_model_card(tmp_path, metrics=evaluation.metrics, num_draws=2, data="test.csv")
    bara.write_model_card(tmp_path, rank=rank)
    bara.write_model_card(tmp_path, metrics=evaluation.metrics, num_draws=2, data="test.csv")
    text = path.read_text()
    assert text.count(f"| nll | {evaluation.metrics['nll']:.4f} |") == 1
    assert text.count("## Calibration metrics") == text.count("## Effective rank") == 1
    assert "On `test.csv`, 2 posterior draws." in text
    assert f"s_bar = {rank.s_bar:.2f} ± {rank.s_bar_std:.2f} over draws" in text
    for name, mean in zip(rank.layers, rank.per_layer, strict=True):
        assert f"| {name} | {mean:.2f} | 4 |" in text
    order = [text.index(part) for part in ("## How to", "## Effective", "## Calibration", "My own")]
    assert order == sorted(order)
    assert r"My own words: 50 % $x$ \1." in text
    assert PeftModel.from_pretrained(model.unload(), tmp_path)

    model.save_pretrained(tmp_path)  # other weights, perhaps
    text = path.read_text()
    assert "## Calibration metrics" not in text
    assert "## Effective rank" not in text
    assert text.count("# BaRA adapter") == 1
    assert "My own words" in text


def test_a_missing_card_is_made_and_a_damaged_one_refused(model, data, tmp_path):
    rank = bara.effective_rank(model, data)
    bara.write_model_card(tmp_path, rank=rank)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"
    (tmp_path / "README.md").write_text("---\n[1, 2\n---\nwords\n")
    with pytest.raises(BaraError, match="is not a model card"):
        bara.write_model_card(tmp_path, rank=rank)
    assert (tmp_path / "README.md").read_text() == "---\n[1, 2\n---\nwords\n"
    with pytest.raises(BaraError, match="there is no adapter folder"):
        bara.write_model_card(tmp_path / "no", rank=rank)


def test_exports_say_what_they_are(model, data, tmp_path):
    held_out = {name: data[name] for name in ("input_ids", "attention_mask")}
    export = bara.export_lora(model, tmp_path / "mean", data=held_out, held_out=held_out)
    card = ModelCard.load(tmp_path / "mean" / "README.md")
    assert "A plain LoRA adapter: the posterior mean of a BaRA adapter." in card.text
    assert str(export.difference) in card.text
    assert "import bara" not in card.text
    bara.export_lora(model, tmp_path / "draws", mode="draws", num_draws=2)
    assert "2 plain LoRA adapters" in (tmp_path / "draws" / "README.md").read_text()
