"""The model card that comes with an adapter."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from peft import LoraConfig, PeftModel
from transformers import BertModel

import bara
from bara import BaraError
from bara.cards.loading_code import SavedAdapter, loading_code
from bara.evaluation.abstention import load_threshold, save_threshold
from bara.evaluation.conformal import load_conformal, save_conformal
from bara.models.sentence import SentenceClassifier
from conftest import tiny_bert_config
from helpers import adapt, stir, tiny_llama


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
        '"tiny/bert", num_labels=3, ignore_mismatched_sizes=True',
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


def test_saving_again_removes_what_was_calibrated_on_earlier_weights(model, data, tmp_path):
    model.save_pretrained(tmp_path)
    predictive = bara.predict(model, data, num_draws=2)
    few = predictive.select([0, 1, 2] * 20)
    save_conformal(tmp_path, bara.calibrate_conformal(few), num_draws=2, seed=0)
    save_threshold(tmp_path, bara.calibrate_threshold(few, risk=0.5), num_draws=2, seed=0)
    (tmp_path / "temperature.json").write_text("{}")
    stir(model, 0.1).save_pretrained(tmp_path)
    with pytest.raises(BaraError, match="has no conformal calibration"):
        load_conformal(tmp_path, num_draws=2, seed=0)
    with pytest.raises(BaraError, match="has no threshold"):
        load_threshold(tmp_path, 0.5, num_draws=2, seed=0)
    assert (tmp_path / "temperature.json").exists()


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


def test_metrics_are_results_that_the_hub_reads(model, data, tmp_path):
    model.save_pretrained(tmp_path / "mine")
    path = tmp_path / "mine" / "README.md"
    other = EvalResult("text-classification", "glue", "GLUE", "accuracy", 0.5)
    card = ModelCard.load(path)
    card.data.model_name, card.data.eval_results = "my-model", [other]
    card.save(path)
    metrics = bara.evaluate(model, data, num_draws=2).metrics
    table = tmp_path / "test.csv"
    table.touch()
    for value in (0.1, 0.2):  # the second takes the place of the first
        measured = metrics | {"nll": value, "aurc": float("nan")}
        measured = {"metrics": measured, "num_draws": 2, "data": str(table)}
        bara.write_model_card(tmp_path / "mine", **measured)
    index = ModelCard.load(path).data.to_dict()["model-index"]
    name, (first, *ours) = model_index_to_eval_results(index)
    assert name == "my-model"
    assert first == other
    assert {r.metric_type: r.metric_value for r in ours} == {
        key: value for key, value in (metrics | {"nll": 0.2}).items() if key != "aurc"
    }
    for result in ours:
        assert (result.task_type, result.dataset_name) == ("text-classification", "test.csv")
        assert result.metric_args == {"num_draws": 2}
    assert eval_results_to_model_index(name, [first, *ours]) == index
    model.save_pretrained(tmp_path / "mine")  # other weights, perhaps
    assert ModelCard.load(path).data.eval_results == [other]


def test_data_without_a_name_is_no_result(model, data, tmp_path):
    model.save_pretrained(tmp_path)
    metrics = bara.evaluate(model, data, num_draws=2).metrics
    bara.write_model_card(tmp_path, metrics=metrics, data="hub/data")
    result = ModelCard.load(tmp_path / "README.md").data.eval_results[0]
    assert (result.dataset_type, result.metric_args) == ("hub/data", None)
    bara.write_model_card(tmp_path, metrics=metrics)
    data = ModelCard.load(tmp_path / "README.md").data
    assert "model-index" not in data.to_dict()
    assert "model_name" not in data.to_dict()


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


RUN_CARDS = """
import json, sys
sys.modules["bara"] = None
import torch
for block, inputs, output in json.loads(sys.argv[1]):
    names = {}
    exec(block, names)
    with torch.no_grad():
        torch.save(names["model"](**torch.load(inputs)).logits, output)
assert sys.modules["bara"] is None
"""
KINDS = ("sentence", "sequence", "other-head", "language")


def blocks(card: Path) -> list[str]:
    """The Python of a card, its folder's place filled in."""
    found = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return [block.replace("path/to/this/folder", str(card.parent)) for block in found]


@pytest.fixture
def bases(tmp_path, tiny_bert):
    """Models on disk whose adapters the card has to load, each by its kind."""
    torch.manual_seed(0)
    BertModel(tiny_bert_config()).save_pretrained(tmp_path / "sentence")  # 2 labels, as is usual
    tiny_bert.save_pretrained(tmp_path / "sequence")
    tiny_llama().save_pretrained(tmp_path / "language")
    other = tiny_bert_config(num_labels=5)  # a checkpoint with another task's head
    type(tiny_bert)(other).save_pretrained(tmp_path / "other-head")

    def make(kind: str) -> PeftModel:
        folder = tmp_path / kind
        if kind == "sentence":
            base = SentenceClassifier.from_encoder(str(folder), num_labels=3)
        elif kind == "language":
            base = tiny_llama().from_pretrained(folder)
        else:
            options = {"num_labels": 3, "ignore_mismatched_sizes": True}
            base = type(tiny_bert).from_pretrained(folder, **options)
        task = "CAUSAL_LM" if kind == "language" else "SEQ_CLS"
        return stir(adapt(base, local_gate=False, task_type=task), 0.3).eval()

    return make


def test_the_code_of_a_card_loads_what_was_saved(bases, data, tmp_path):
    expected, jobs = {}, []
    for kind in KINDS:
        model = bases(kind)
        inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
        if kind != "language":
            inputs["attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).repeat(3, 1)
            inputs["token_type_ids"] = torch.tensor([0, 0, 1, 1]).expand(6, 4)
        torch.save(inputs, tmp_path / f"{kind}-inputs.pt")
        with torch.no_grad():
            expected[kind] = model(**inputs).logits
            with model.disable_adapter():
                assert (model(**inputs).logits - expected[kind]).abs().max() > 1e-2
        model.save_pretrained(tmp_path / f"{kind}-trained")
        bara.export_lora(model, tmp_path / f"{kind}-mean")
        (block,) = blocks(tmp_path / f"{kind}-mean" / "README.md")
        jobs.append([block, *(str(tmp_path / f"{kind}-{x}.pt") for x in ("inputs", "logits"))])

        with_bara, without = blocks(tmp_path / f"{kind}-trained" / "README.md")
        assert without == block.replace(str(tmp_path / f"{kind}-mean"), "plain-lora")
        names = {"data": inputs, "inputs": inputs}
        exec(with_bara, names)
        with torch.no_grad():
            torch.testing.assert_close(names["model"](**inputs).logits, expected[kind])
    bara.export_lora(bases("sentence"), tmp_path / "draws", mode="draws", num_draws=1)
    (block,) = blocks(tmp_path / "draws" / "README.md")
    jobs.append([block, str(tmp_path / "sentence-inputs.pt"), str(tmp_path / "draw.pt")])

    command = [sys.executable, "-c", RUN_CARDS, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        logits = torch.load(tmp_path / f"{kind}-logits.pt")
        torch.testing.assert_close(logits, expected[kind], atol=1e-5, rtol=1e-4)
    assert torch.load(tmp_path / "draw.pt").shape == (6, 3)


def test_the_code_of_a_card_refuses_another_base(bases, tmp_path):
    bara.export_lora(bases("sentence"), tmp_path / "mean")
    config = LoraConfig(task_type="SEQ_CLS", base_model_name_or_path=str(tmp_path / "sentence"))
    saved = SavedAdapter(num_labels=3)
    wrong = loading_code(config, saved, str(tmp_path / "mean"), library="peft")
    assert "AutoModelForSequenceClassification" in wrong
    with pytest.raises(AssertionError, match="trained on another base model"):
        exec(wrong.removeprefix("```python\n").removesuffix("```\n"), {})


def test_a_card_says_what_it_cannot_know(tmp_path):
    bara.BaraConfig(task_type="SEQ_CLS").save_pretrained(tmp_path / "no-weights")
    card = (tmp_path / "no-weights" / "README.md").read_text()
    assert "NUM_LABELS = ...  # as in training" in card
    bara.BaraConfig().save_pretrained(tmp_path / "no-task")
    assert "The adapter names no task" in (tmp_path / "no-task" / "README.md").read_text()


def test_the_documentation_has_the_lines_of_the_cards(model, data, tmp_path, monkeypatch):
    docs = (Path(__file__).parent.parent / "docs" / "ranks-and-export.md").read_text()
    for task, saved in (
        ("SEQ_CLS", SavedAdapter(num_labels=3)),
        ("SEQ_CLS", SavedAdapter(sentence=True, num_labels=3)),
        ("CAUSAL_LM", SavedAdapter()),
    ):
        config = LoraConfig(task_type=task, base_model_name_or_path="BASE")
        assert loading_code(config, saved, "plain", library="peft") in docs
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("my-adapter")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", docs, re.DOTALL) if "model_card" in b)
    exec(block, {"bara": bara, "model": model, "data": data})
    assert "On `test.csv`, 10 posterior draws." in Path("my-adapter/README.md").read_text()


def test_ranks_and_modules_of_a_pruned_adapter_are_short(tmp_path):
    model = adapt(tiny_llama(num_hidden_layers=5), local_gate=False, task_type="CAUSAL_LM")
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_posterior")]
    for layer in layers:
        layer.lora_posterior["default"].global_logit.data.fill_(0.2)
    layers[0].lora_posterior["default"].global_logit.data[1:] = -1.0
    layers[1].lora_posterior["default"].global_logit.data[:] = -1.0
    bara.prune(model).model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| r | 1-4, 33 factors in 9 layers |" in card
    assert "| target modules | 9: q_proj (5), v_proj (4) |" in card
