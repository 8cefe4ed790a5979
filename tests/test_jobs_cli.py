"""Conformal sets, choosing what to label, review and recommended ranks in the terminal."""

import csv
import json
from pathlib import Path

import pytest

from bara.finetuning.load import load_adapter
from bara.finetuning.task_inputs import predict_table, read_table
from conftest import write_jsonl
from test_rank_cli import WORDS, make_adapter

DRAWS = ["--num-draws", "3"]


@pytest.fixture
def table(tmp_path):
    rows = [
        {"text": f"the {noun} is {word}", "label": "pos" if i < 3 else "neg"}
        for i, word in enumerate(WORDS)
        for noun in ("film", "plot , it was", "food")
    ]
    return write_jsonl(tmp_path / "table.jsonl", rows)


@pytest.fixture
def adapter(tmp_path, tiny_model_dir, table):
    return make_adapter(tmp_path, tiny_model_dir, table, "bara")


def records(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def predicted(adapter, table):
    model, tokenizer, task = load_adapter(adapter)
    rows = read_table(str(table), task)
    return predict_table(model, tokenizer, task, rows, labels=False, num_draws=3, progress=False)


def test_prediction_sets(tmp_path, adapter, table, run, failing):
    out = tmp_path / "sets.jsonl"
    predict = ["predict", adapter, "--data", table, "--output", out, *DRAWS, "--coverage"]
    assert "--calibrate-conformal" in failing(*predict, 0.8)
    shown = run("evaluate", adapter, "--data", table, *DRAWS, "--calibrate-conformal")
    assert "--coverage 0.9" in shown
    run(*predict, 0.8)
    found = records(out)
    assert all(set(row["prediction_set"]) <= {"pos", "neg"} for row in found)
    # of the rows that it was calibrated on, ceil(0.8 * 19) = 16 are inside at least
    truth = [row["label"] for row in records(table)]
    inside = [label in row["prediction_set"] for row, label in zip(found, truth, strict=True)]
    assert sum(inside) >= 16
    assert "18 labelled rows cannot promise a coverage of 0.99" in failing(*predict, 0.99)
    other = [*predict, 0.8, "--seed", 1]
    assert "made with seed = 0, not 1" in failing(*other)


def test_intervals_of_a_regression(tmp_path, tiny_model_dir, run):
    rows = [{"text": f"the film is {word}", "score": i + 0.5} for i, word in enumerate(WORDS * 2)]
    table = write_jsonl(tmp_path / "scores.jsonl", rows)
    run("train", "--model", tiny_model_dir, "--data", table, "--label-column", "score",
        "--output", tmp_path / "a", "--set", "training.max_steps=1")  # fmt: skip
    run("evaluate", tmp_path / "a", "--data", table, *DRAWS, "--calibrate-conformal")
    out = tmp_path / "o.jsonl"
    run("predict", tmp_path / "a", "--data", table, *DRAWS, "--coverage", 0.9, "--output", out)
    found = records(out)
    assert all(row["interval"][0] < row["prediction"] < row["interval"][1] for row in found)
    inside = [
        row["interval"][0] <= truth["score"] <= row["interval"][1]
        for row, truth in zip(found, rows, strict=True)
    ]
    assert sum(inside) == 12  # the quantile is the largest of 12 errors


@pytest.mark.parametrize("by", ["batch", "bald", "entropy", "diversity"])
def test_select(tmp_path, adapter, table, run, by):
    out = tmp_path / "chosen.csv"
    options = ["--data", table, "--k", 5, "--by", by, *DRAWS]
    assert "has 5 of the 18 rows" in run("select", adapter, *options, "--output", out)
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    pool, predictive = records(table), predicted(adapter, table)
    assert len({row["row"] for row in rows}) == 5
    for row in rows:
        i = int(row["row"]) - 1
        assert row["text"] == pool[i]["text"]
        for name in ("epistemic", "total"):
            score = row[{"epistemic": "bald", "total": "entropy"}[name]]
            expected = getattr(predictive, f"{name}_uncertainty")[i]
            assert float(score) == pytest.approx(float(expected), abs=1e-5)
    if by in ("bald", "entropy"):
        scores = [float(row[by]) for row in rows]
        assert scores == sorted(scores, reverse=True)
    lines = run("select", adapter, *options).splitlines()
    assert [str(json.loads(line)["row"]) for line in lines] == [row["row"] for row in rows]


def test_review(tmp_path, adapter, table, run):
    calibrate = ["--calibrate-risk", 0.6, "--calibrate-delta", 0.4]
    run("evaluate", adapter, "--data", table, *DRAWS, *calibrate)
    out = tmp_path / "review.jsonl"
    options = ["--data", table, *DRAWS, "--abstain-at-risk", 0.6]
    shown = run("review", adapter, *options, "--output", out)
    assert "expected error rate of the rest" in shown
    assert "asks to review the first" in shown
    rows, predictive = records(out), predicted(adapter, table)
    uncertainty = (1 - predictive.probs.amax(-1)).tolist()
    assert [row["row"] - 1 for row in rows] == sorted(range(18), key=lambda i: -uncertainty[i])
    assert all(row["text"] == records(table)[row["row"] - 1]["text"] for row in rows)
    rest = [uncertainty[row["row"] - 1] for row in rows[6:]]
    assert rows[5]["expected_error_after"] == pytest.approx(sum(rest) / 12, abs=1e-5)
    abstained = tmp_path / "p.jsonl"
    run("predict", adapter, *options, "--output", abstained)
    declined = [i for i, row in enumerate(records(abstained)) if row["abstained"]]
    assert sorted(row["row"] - 1 for row in rows if row["review"]) == declined
    plain = run("review", adapter, "--data", table, *DRAWS, "--output", "-").splitlines()
    assert "review" not in json.loads(plain[0])


def test_recommended_ranks_train(tmp_path, adapter, table, run):
    out = tmp_path / "ranks"
    shown = run("ranks", adapter, "--data", table, *DRAWS, "--output", out, "--recommend")
    assert "For plain LoRA: r=" in shown
    assert "rank_pattern = {" in shown
    page = (Path(__file__).parent.parent / "docs/rank-recommendation.md").read_text("utf-8")
    assert ("does not pay" in page) == ("it did not pay" in shown)
    recipe = out / "lora.yaml"
    assert f"bara train --config {recipe}" in shown
    run("train", "--config", recipe, "--data", table, "--output", tmp_path / "plain",
        "--set", "training.max_steps=1")  # fmt: skip
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text("utf-8"))
    assert config["peft_type"] == "LORA"
    assert f"rank_pattern = {config['rank_pattern']}" in shown.replace("\n", "")


def test_bad_input_is_one_clear_line(tmp_path, adapter, table, tiny_model_dir, failing):
    data = ["--data", table]
    assert "give a .jsonl or .csv file" in failing("select", adapter, *data, "--output", "x.txt")
    assert "give a .jsonl or .csv file" in failing("review", adapter, *data, "--output", "x.txt")
    assert "between 1 and the 18 inputs" in failing("select", adapter, *data, *DRAWS, "--k", 19)
    assert "by must be one of" in failing("select", adapter, *data, "--by", "best")
    taken = write_jsonl(tmp_path / "t.jsonl", [{"text": "good", "bald": 1}])
    line = failing("select", adapter, "--data", taken, "--k", 1, *DRAWS)
    assert "has a column 'bald' already" in line
    lora = make_adapter(tmp_path, tiny_model_dir, table, "lora")
    assert "needs draws that differ" in failing("select", lora, *data, "--k", 2, "--by", "bald")
    assert "Bayesian adapter" in failing("select", lora, *data, "--k", 2)
