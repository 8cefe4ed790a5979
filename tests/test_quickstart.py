"""The main job, small: every file and number that it promises."""

import json

import pytest
import torch

from bara import BaraError
from bara.cli import main
from bara.data.examples import load_sentiment
from bara.evaluation.metrics import Evaluation
from bara.finetuning.load import load_adapter
from bara.prediction.predictive import ClassificationPredictive
from bara.quickstart import choose_examples


def test_quickstart_writes_its_folder(tmp_path, capsys):
    output = tmp_path / "run"
    options = "--num-train 32 --num-test 30 --num-ood 10 --epochs 2 --num-draws 2 --seed 1"
    assert main(["quickstart", "--output", str(output), *options.split(" ")]) == 0
    printed = capsys.readouterr().out
    for word in ("LoRA", "BaRA", "NLL", "Sure", "Unsure", "Wrong", "bara predict", "report.html"):
        assert word in printed
    results = json.loads((output / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["LoRA", "BaRA"]
    for row in results["rows"]:
        assert 0 <= row["accuracy"] <= 1
        assert row["nll"] > 0
        assert 0 < row["s_bar"] <= row["r"] == 8
    assert len(results["rank"]["per_layer"]) == 18
    assert len(results["rank"]["per_input"]) == 30
    for picture in ("reliability", "risk_coverage", "rank_layers", "rank_inputs"):
        assert (output / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text()
    assert "<html" in page
    assert 'src="http' not in page
    for method in ("lora", "bara"):
        model, _, task = load_adapter(output / method)
        assert task.label_names == ("negative", "neutral", "positive")
        size = sum(p.numel() for n, p in model.named_parameters() if ".default." in n)
        row = next(row for row in results["rows"] if row["method"].lower() == method)
        assert row["trainable_parameters"] == size


def test_examples_are_chosen_by_certainty():
    probs = torch.tensor([[0.98, 0.02], [0.5, 0.5], [0.1, 0.9], [0.8, 0.2]])
    labels = torch.tensor([0, 0, 0, 0])
    predictive = ClassificationPredictive(probs.log().unsqueeze(0), labels)
    texts = ["a", "b", "c", "d"]
    examples = choose_examples(Evaluation({}, predictive), texts, ["no", "yes"], count=1)
    assert [examples[key][0]["text"] for key in ("Sure", "Unsure", "Wrong")] == ["a", "b", "c"]
    assert examples["Wrong"][0] == pytest.approx(
        {
            "text": "c",
            "prediction": "yes",
            "label": "no",
            "confidence": 0.9,
            "uncertainty": -(0.1 * torch.tensor(0.1).log() + 0.9 * torch.tensor(0.9).log()).item(),
        }
    )


def test_too_many_texts_are_refused():
    with pytest.raises(BaraError, match="were asked for"):
        load_sentiment(10**6)
