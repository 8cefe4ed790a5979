"""Equal labels: what a method may choose, on a part of them and nothing else."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import Trainer, TrainingArguments

import bara
from bara.bench import select
from bara.bench.cell import run_cell
from bara.bench.models import Fitted
from bara.bench.page import write_outputs
from bara.bench.results import append_row
from bara.bench.run import RESULTS_FILE, pending
from bara.bench.spec import Benchmark, Cell
from bara.errors import BaraError
from bara.prediction.predictive import ClassificationPredictive
from bara.prediction.temperature import get_temperature
from bara.training.epochs import BestEpoch, StopAfter
from helpers import TinyNet, adapt
from test_bench import benchmark_file

SEARCH = {"learning_rates": [0.01, 0.1], "strengths": [1, 2], "epochs": [1, 2], "held_back": 0.25}


def cells(tmp_path, **options):
    values = {"model": "none", "labels": 16, "train_sizes": None, "num_validation": None}
    path = benchmark_file(tmp_path, **(values | options))
    values = {k: v for k, v in json.loads(path.read_text()).items() if v is not None}
    path.write_text(json.dumps(values))
    return list(Benchmark.load(path).cells())


def test_methods_have_the_parts_of_the_search_that_they_have_a_use_for(tmp_path):
    methods = ["probe", "lora", "bara", {"name": "as it is", "method": "bara", "select": False}]
    probe, lora, bara, plain = cells(tmp_path, methods=methods, select=SEARCH)
    assert probe.select == plain.select == {}
    assert lora.select["strengths"] is None
    assert bara.select["strengths"] == [1, 2]
    assert {cell.train_size for cell in (probe, lora, bara, plain)} == {16}
    assert {cell.num_validation for cell in (probe, lora, bara, plain)} == {0}
    assert Cell.from_dict(json.loads(json.dumps(asdict(bara)))).key == bara.key != plain.key
    probe, *_ = cells(tmp_path, methods=methods, select=SEARCH | {"temperature": True})
    assert probe.select["temperature"]
    assert probe.select["learning_rates"] is None


def test_a_cell_without_a_search_has_the_key_that_it_had(tmp_path):
    """A hash of its fields as they were before there was a search."""
    cell = next(iter(Benchmark.load(benchmark_file(tmp_path, model="none")).cells()))
    fields = asdict(cell)
    assert fields.pop("select") == {}
    for name in ("benchmark", "name", "data"):
        del fields[name]
    import hashlib

    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    assert cell.key == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 0}, "labels must be a whole number above 1"),
        ({"labels": {"film": 20}}, "did you mean 'films'"),
        ({"tasks": ["films", "scores"], "labels": {"films": 20}}, "no number for the task scores"),
        ({"train_sizes": [10]}, "labels are all there are; leave out train_sizes"),
        ({"labels": None, "select": SEARCH}, "give these too"),
        ({"select": {"rates": [1]}}, "select: there is no 'rates'"),
        ({"select": {"held_back": 1}}, "held_back must be below 1"),
        ({"select": {"learning_rates": []}}, "learning_rates must be a list of 1 or more"),
        ({"methods": [{"name": "a", "method": "lora", "select": "no"}]}, "select must be true"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, message):
    with pytest.raises(BaraError, match=message):
        cells(tmp_path, **options)


def test_a_temperature_is_part_of_the_search(tmp_path):
    cells(tmp_path, methods=["lora+temperature"])
    with pytest.raises(BaraError, match=r"set select\.temperature"):
        Benchmark.load(tmp_path / "tiny.yaml").check()


class FakeModel(torch.nn.Module):
    """Gives the label a probability that its options decide."""

    def __init__(self, correct):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {})()
        self.correct = correct


@pytest.mark.parametrize("again", [True, False])
def test_the_best_on_the_held_back_labels_is_what_is_tested(tmp_path, monkeypatch, again):
    (cell,) = cells(
        tmp_path, methods=["bara"], select=SEARCH | {"again": again, "temperature": True}
    )
    from datasets import Dataset

    table = Dataset.from_dict({"text": [str(i) for i in range(16)], "label": ["a", "b"] * 8})
    seen = []

    def fit(cell, splits, folder, callbacks=(), evaluate="no"):
        assert cell.select == {}
        rate, strength = cell.training["learning_rate"], cell.method_options["strength"]
        seen.append((rate, strength, cell.epochs, sorted(splits.train["text"])))
        model = FakeModel(0.4 + rate + 0.1 * strength + 0.05 * cell.epochs)

        def predict(table, labels=True, **options):
            assert set(table["text"]).isdisjoint(splits.train["text"])
            p = torch.full((len(table), 2), (1 - model.correct))
            p[:, 0] = model.correct
            return ClassificationPredictive(p.log()[None], torch.zeros(len(table)).long())

        return Fitted(model, 1, predict, None)

    monkeypatch.setattr(select, "fit", fit)
    fitted, found = select.fit_selected(cell, table, tmp_path)
    candidates = seen[:8]
    assert {c[:3] for c in candidates} == {
        (rate, strength, epochs) for rate in (0.01, 0.1) for strength in (1, 2) for epochs in (1, 2)
    }
    assert {len(c[3]) for c in candidates} == {12}
    assert len({tuple(c[3]) for c in candidates}) == 1  # the same labels for all
    chosen = found["chosen"]
    assert (chosen["learning_rate"], chosen["strength"], chosen["epochs"]) == (0.1, 2, 2)
    assert chosen["temperature"] == get_temperature(fitted.model)
    assert found["held_back"] == 4
    assert [row["nll"] for row in found["search"]] == pytest.approx(
        [-float(torch.tensor(0.4 + r + 0.1 * s + 0.05 * e).log()) for r, s, e, _ in candidates]
    )
    if again:
        assert seen[8:] == [(0.1, 2, 2.0, sorted(table["text"]))]
    else:
        assert len(seen) == 8


def trainer(tmp_path, callback, epochs=6, **options):
    torch.manual_seed(0)
    model = TinyNet()
    rows = [{"x": torch.randn(6), "labels": torch.randn(5)} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=epochs,
        learning_rate=0.3,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    torch.manual_seed(1)
    held_out = [{"x": torch.randn(6), "labels": torch.randn(5)} for _ in range(8)]
    return Trainer(
        model, arguments, train_dataset=rows, eval_dataset=held_out, callbacks=[callback]
    )


def test_the_best_epoch_comes_back_and_can_be_stopped_at(tmp_path):
    best = BestEpoch()
    whole = trainer(tmp_path, best)
    whole.train()
    losses = [row["eval_loss"] for row in whole.state.log_history if "eval_loss" in row]
    assert len(losses) == 6
    epoch = losses.index(min(losses)) + 1
    assert best.epochs == [epoch]
    assert epoch < 6
    assert whole.evaluate()["eval_loss"] == pytest.approx(min(losses))
    stopped = trainer(tmp_path, StopAfter(best.epochs))
    stopped.train()
    assert stopped.state.epoch == epoch
    for one, other in zip(whole.model.parameters(), stopped.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_best_epoch_of_a_head_in_other_units_comes_back(tmp_path, tiny_bert):
    rows = [
        {"input_ids": torch.tensor([2, 5 + i % 7, 3]), "labels": torch.tensor(i % 2)}
        for i in range(16)
    ]
    model = adapt(
        tiny_bert, "bara", task_type="SEQ_CLS", target_modules=["query"], head_input_std=50.0
    )
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=3, learning_rate=0.05, eval_strategy="epoch",
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    best = BestEpoch()
    training = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:5], callbacks=[best]
    )
    training.add_callback(bara.BayesianCallback())
    training.train()
    losses = [row["eval_loss"] for row in training.state.log_history if "eval_loss" in row]
    assert training.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_a_cell_with_a_search_says_what_it_chose(tmp_path, tiny_model_dir):
    search = {"learning_rates": [1e-4, 0.02], "early_stopping": True, "temperature": True}
    lora, ensemble = cells(
        tmp_path,
        model=str(tiny_model_dir),
        methods=["lora", "ensemble"],
        method_options={"target_modules": ["query"]},
        epochs=[2],
        select=search,
    )
    ensemble = replace(ensemble, method_options={**ensemble.method_options, "num_members": 2})
    for cell in (lora, ensemble):
        row = run_cell(cell)
        chosen = row["chosen"]
        assert chosen["learning_rate"] in (1e-4, 0.02)
        assert 1 <= chosen["stopped_after"] <= 2
        assert chosen["temperature"] > 0
        best = min(row["search"], key=lambda candidate: candidate["nll"])
        assert best["learning_rate"] == chosen["learning_rate"]
        assert len(row["search"]) == 2
        assert row["held_back"] == 3
        assert 0 < row["seconds_search"] < row["seconds"]
        assert row["seconds_train"] > 0
        append_row(tmp_path / "out" / RESULTS_FILE, row)
    benchmark = Benchmark.load(tmp_path / "tiny.yaml")
    assert [cell.name for cell in pending([benchmark], tmp_path / "out")] == ["ensemble"]
    write_outputs([benchmark], tmp_path / "out")
    heading, values = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert dict(zip(heading.split(","), values.split(","), strict=False))["chosen.learning_rate"]
    assert "search s" in (tmp_path / "out" / "report.html").read_text()
