"""The main job, small: every file and number that it promises."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bara.cli import main
from bara.cli.quickstart import duration
from bara.data.examples import load_sentiment
from bara.evaluation.metrics import Evaluation
from bara.finetuning.load import load_adapter
from bara.prediction.predictive import ClassificationPredictive
from bara.quickstart import (
    LEAST_EPOCHS,
    TINY,
    TOO_SMALL,
    Pace,
    Size,
    choose_examples,
    measure_pace,
)


def test_quickstart_writes_its_folder(tmp_path, capsys):
    output = tmp_path / "run"
    options = "--num-train 32 --num-test 30 --num-ood 10 --epochs 2 --num-draws 2 --seed 1"
    assert main(["quickstart", "--output", str(output), *options.split(" ")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"takes about \d+ (seconds|minutes) here", printed)
    for word in (
        "probe",
        "LoRA",
        "BaRA",
        "NLL",
        "Sure",
        "Unsure",
        "Wrong",
        "bara predict",
        "report.html",
    ):
        assert word in printed
    results = json.loads((output / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["probe", "LoRA", "BaRA"]
    for row in results["rows"]:
        assert 0 <= row["accuracy"] <= 1
        assert row["nll"] > 0
        adapted = row["method"] != "probe"
        assert row["r"] == 8 * adapted
        assert (row["s_bar"] > 0) == adapted
        assert row["s_bar"] <= row["r"]
    assert len(results["rank"]["per_layer"]) == 18
    assert len(results["rank"]["per_input"]) == 30
    for picture in ("reliability", "risk_coverage", "rank_layers", "rank_inputs"):
        assert (output / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text()
    for text in (page, " ".join(printed.split())):  # 32 texts are too few
        assert TOO_SMALL in text
    assert not results["judges"]
    assert "<html" in page
    assert 'src="http' not in page
    for method in ("probe", "lora", "bara"):
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


def test_too_many_texts_are_refused(tmp_path, failing):
    for option in ("--num-train", "--num-test", "--num-ood"):
        error = failing("quickstart", "--output", tmp_path / "out", option, 10**6)
        assert "were asked for" in error
        assert option in error


def test_the_estimate_is_the_steps_and_the_predictions(monkeypatch):
    """By a clock that shows a second more whenever it is read."""
    clock = iter(range(100))
    monkeypatch.setattr(
        "bara.quickstart.time", SimpleNamespace(perf_counter=lambda: float(next(clock)))
    )
    data = load_sentiment(num_train=64, num_test=30, num_validation=0)
    size = Size(num_train=64, num_test=30, num_ood=10, epochs=2.5, num_draws=2)
    # 3 steps and what is around them: 7 readings later; a prediction of 30 texts by 2 draws: 1
    once, step, text = 7 - 3, 1, 1 / 60
    expected = 3 * once + 2 * 5 * step + (2 * 40 + 2 * 40 + 30 + 64) * text
    pace = measure_pace(data.train, data.test)
    assert pace.seconds(size) == pytest.approx(expected)


def test_a_slow_machine_does_less():
    size = Size()
    pace = Pace(once=5.0, step=1.0, text=0.01, batch=32)
    assert pace.shortened(size, pace.seconds(size)) == size
    shorter = pace.shortened(size, 300)
    assert pace.seconds(shorter) <= 300 < pace.seconds(replace(shorter, epochs=shorter.epochs + 1))
    assert (shorter.num_train, shorter.num_test, shorter.num_ood) == (300, 400, 200)
    assert pace.shortened(size, 1).epochs == LEAST_EPOCHS
    assert not shorter.judges


def test_tiny_is_small_and_says_so(monkeypatch, capsys):
    asked = []

    def run(output, size, **options):
        asked.append(size)
        options["announce"](200.0, size)
        assert options["minutes"] == (5 if size == Size() else None)
        return {"rows": [], "examples": {}, "shortened": False}

    monkeypatch.setattr("bara.quickstart.run_quickstart", run)
    assert main(["quickstart", "--tiny", "--num-draws", "3"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert TOO_SMALL in printed
    assert "about 4 minutes" in printed
    assert main(["quickstart"]) == 0
    assert TOO_SMALL not in " ".join(capsys.readouterr().out.split())
    assert asked == [Size(TINY.num_train, TINY.num_test, TINY.num_ood, TINY.epochs, 3), Size()]
    # texts through a training step, and through a prediction
    trained, predicted = (
        [size.num_train * size.epochs for size in asked],
        [(size.num_test + size.num_ood) * size.num_draws for size in asked],
    )
    assert trained[1] / trained[0] > 40
    assert predicted[1] / predicted[0] > 20


@pytest.mark.parametrize(
    ("seconds", "said"), [(4, "10 seconds"), (61, "70 seconds"), (91, "2 minutes")]
)
def test_durations_are_rounded_up(seconds, said):
    assert duration(seconds) == said
