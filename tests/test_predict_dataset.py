"""Predictions of folders of tables: formats, resuming, and workers on a Ray cluster."""

import json
import os
import shutil
import threading
import time

import pandas as pd
import pytest
import yaml

import bara
from bara import BaraError, predict_dataset
from bara.data import tables
from bara.finetuning import prediction_parts
from bara.finetuning.finetune import finetune
from bara.finetuning.predict_dataset import Job
from bara.methods.recipe import TrainRecipe
from conftest import WORDS, write_jsonl
from helpers import start_ray
from test_cli import base_and_table

LABEL_WORDS = WORDS.split(" ")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_tokenizer):
    """A trained adapter; its table lies beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    table = base_and_table(folder, tiny_tokenizer)
    return finetune(
        TrainRecipe(
            model=str(folder / "base"),
            data=str(table),
            output=str(folder / "adapter"),
            training={"num_train_epochs": 1},
        )
    )


def rows(number, count):
    words = [LABEL_WORDS[(number * 7 + i * 3 + j) % 18] for i in range(count) for j in range(5)]
    return [
        {"id": f"{number}-{i}", "text": " ".join(words[5 * i : 5 * i + 1 + i % 5])}
        for i in range(count)
    ]


@pytest.fixture
def data(tmp_path):
    """A folder with one table of each kind, one of them in a subfolder."""
    folder = tmp_path / "data"
    (folder / "part").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", rows(1, 5))
    pd.DataFrame(rows(2, 4)).to_csv(folder / "b.csv", index=False)
    pd.DataFrame(rows(3, 3)).to_parquet(folder / "part" / "c.parquet")
    return folder


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


def test_every_format_holds_the_same_as_predict(tmp_path, adapter, data):
    done = predict_dataset(adapter, data, tmp_path / "out", keep_columns=["id"], num_draws=3)
    names = ["a.jsonl", "b.csv", "part/c.parquet"]
    assert sorted(done.written) == [tmp_path / "out" / name for name in names]
    assert (done.skipped, done.rows) == ([], 12)
    model, tokenizer, task = bara.load_adapter(adapter)
    found = {
        "a.jsonl": pd.read_json(tmp_path / "out" / "a.jsonl", lines=True),
        "b.csv": pd.read_csv(tmp_path / "out" / "b.csv"),
        "part/c.parquet": pd.read_parquet(tmp_path / "out" / "part" / "c.parquet"),
    }
    for number, (name, frame) in enumerate(found.items(), start=1):
        given = rows(number, 6 - number)
        inputs = tokenizer([row["text"] for row in given], padding=True, return_tensors="pt")
        expected = bara.predict(model, inputs, num_draws=3)
        assert frame["id"].tolist() == [row["id"] for row in given]
        assert frame["epistemic"].tolist() == pytest.approx(
            expected.epistemic_uncertainty.tolist(), abs=1e-5
        )
        first = task.label_names[0]
        given = (
            frame[f"probabilities.{first}"]
            if name == "b.csv"
            else [p[first] for p in frame["probabilities"]]
        )
        assert list(given) == pytest.approx(expected.probs[:, 0].tolist(), abs=1e-5)
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_second_run_does_what_is_missing_or_has_changed(tmp_path, adapter, data):
    out = tmp_path / "out"
    first = predict_dataset(adapter, data, out, output_format="jsonl", num_draws=2)
    whole = contents(out)
    assert set(whole) == {"a.jsonl", "b.jsonl", "part/c.jsonl"}
    (out / "b.jsonl").unlink()
    (out / "part" / ".c.jsonl.12345678.tmp").write_text("half a f")
    later = time.time() + 10
    os.utime(data / "part" / "c.parquet", (later, later))
    second = predict_dataset(adapter, data, out, output_format="jsonl", num_draws=2)
    assert sorted(second.written) == [out / "b.jsonl", out / "part" / "c.jsonl"]
    assert second.skipped == [out / "a.jsonl"]
    assert sorted(first.written) == sorted([*second.written, *second.skipped])
    assert contents(out) == whole
    assert not list(out.rglob("*.tmp"))
    with pytest.raises(BaraError, match=r"other draws.*give another folder \(--output\)"):
        predict_dataset(adapter, data, out, output_format="jsonl", num_draws=2, seed=1)


def test_a_calibration_or_a_note_makes_no_other_adapter(tmp_path, adapter, data, run):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    predict_dataset(copy, data, tmp_path / "out", num_draws=2)
    recipe = TrainRecipe.load(copy / "recipe.yaml")
    options = ["--data", recipe.data, "--calibrate-conformal", "--calibrate-risk", 0.5]
    run("evaluate", copy, *options, "--num-draws", 2)
    assert (copy / "conformal.safetensors").is_file()
    assert (copy / "abstention.json").is_file()
    recipe.training["logging_steps"] = 7  # read in training only
    (copy / "recipe.yaml").write_text(recipe.to_yaml())
    assert len(predict_dataset(copy, data, tmp_path / "out", num_draws=2).skipped) == 3


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("adapter_config.json", "weight_noise", 4.0),
        ("text_task.json", "max_length", 5),
        ("recipe.yaml", "method", "bara+temperature"),
    ],
)
def test_other_numbers_beside_the_weights_make_another_adapter(
    tmp_path, adapter, data, name, field, value
):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    predict_dataset(copy, data, tmp_path / "out", num_draws=2)
    saved = yaml.safe_load((copy / name).read_text())
    assert saved[field] != value
    (copy / name).write_text(json.dumps(saved | {field: value}))
    with pytest.raises(BaraError, match="of another adapter"):
        predict_dataset(copy, data, tmp_path / "out", num_draws=2)


@pytest.fixture
def long(tmp_path, monkeypatch):
    """A Parquet table of 21 rows whose row groups end elsewhere than its parts of 8."""
    monkeypatch.setattr("bara.finetuning.predict_dataset.CHUNK", 4)
    monkeypatch.setattr(prediction_parts, "PART", 8)
    frame = pd.DataFrame(rows(1, 21)).assign(note=[None] * 12 + ["late"] * 9)
    frame.to_parquet(tmp_path / "long.parquet", row_group_size=5)
    return tmp_path / "long.parquet"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_long_table_is_predicted_in_parts(tmp_path, adapter, long, monkeypatch, kind):
    """The same file as in one go, from the first row to the last."""
    options = {"output_format": kind, "keep_columns": ["id", "note"], "num_draws": 2}
    units = prediction_parts.units_of(long, tmp_path / f"x.{kind}")
    assert [(unit.first, unit.last) for unit in units] == [(0, 8), (8, 16), (16, 21)]
    done = predict_dataset(adapter, long, tmp_path / "parts", **options)
    assert (done.written, done.rows) == ([tmp_path / "parts" / f"long.{kind}"], 21)
    monkeypatch.setattr(prediction_parts, "PART", 1000)
    predict_dataset(adapter, long, tmp_path / "whole", **options)
    files = [tmp_path / folder / f"long.{kind}" for folder in ("parts", "whole")]
    if kind == "parquet":
        first, second = map(pd.read_parquet, files)
        pd.testing.assert_frame_equal(first, second)
        assert first["note"].isna().sum() == 12
    else:
        assert files[0].read_bytes() == files[1].read_bytes()
    assert not [p for p in (tmp_path / "parts").rglob("*") if p.is_dir()]


def test_parts_that_are_there_are_not_predicted_again(tmp_path, adapter, long, monkeypatch):
    run, ran = Job.run, []

    def killed_in_the_third(job, unit, advance):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(unit.first)
        return run(job, unit, advance)

    monkeypatch.setattr(Job, "run", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        predict_dataset(adapter, long, tmp_path / "out", num_draws=2)
    assert not (tmp_path / "out" / "long.parquet").exists()
    monkeypatch.setattr(Job, "run", lambda job, unit, _: ran.append(unit.first) or run(job, unit))
    done = predict_dataset(adapter, long, tmp_path / "out", num_draws=2)
    assert ran == [0, 8, 16]
    assert done.rows == len(pd.read_parquet(tmp_path / "out" / "long.parquet")) == 21


def test_a_bad_row_of_a_part_is_told_by_its_number(tmp_path, adapter, long, monkeypatch):
    frame = pd.DataFrame(rows(1, 21))
    frame.loc[13, "text"] = ""
    frame.to_parquet(long, row_group_size=5)
    with pytest.raises(BaraError, match=r"1 of 1 files.*column 'text' is empty in row 14"):
        predict_dataset(adapter, long, tmp_path / "out", num_draws=1)
    monkeypatch.setattr(tables, "MOST_CELLS", 9)
    with pytest.raises(BaraError, match="5 rows in row groups 1 to 1"):
        tables.parquet_rows(long, 5, 10)


def test_a_bad_file_stops_no_other(tmp_path, adapter, data):
    write_jsonl(data / "a0.jsonl", [{"text": "good"}, {"text": ""}])
    with pytest.raises(BaraError, match=r"1 of 4 files.*a0\.jsonl: column 'text' is empty in row"):
        predict_dataset(adapter, data, tmp_path / "out", num_draws=1)
    assert set(contents(tmp_path / "out")) == {"a.jsonl", "b.csv", "part/c.parquet"}


def test_what_cannot_be_is_refused(tmp_path, adapter, data):
    def refused(message, source=data, output=tmp_path / "out", **options):
        with pytest.raises(BaraError, match=message):
            predict_dataset(adapter, source, output, num_draws=1, **options)

    refused("there is no table at", source=tmp_path / "none")
    refused("is inside", output=data / "out")
    refused("is a file", output=data / "a.jsonl")
    refused("one worker or more with executor='ray'", workers=2)
    refused("executor must be", executor="spark")
    refused("output_format must be", output_format="xlsx")
    refused(r"no column \'key\' to keep \(--keep-column\)", keep_columns=["key"])
    write_jsonl(data / "b.jsonl", rows(2, 2))
    refused("two tables would be predicted into", output_format="csv")
    taken = write_jsonl(tmp_path / "t.jsonl", [{"text": "a", "total": 1}])
    other = {"source": taken, "output": tmp_path / "other"}
    refused(r"a 'total' too.*\(--keep-column\)", **other, keep_columns=["total"])
    with pytest.raises(BaraError, match="no adapter folder"):
        predict_dataset(tmp_path / "none", data, tmp_path / "out")


def test_the_command(tmp_path, adapter, data, run, failing):
    given = ["predict", adapter, "--data", data, "--output", tmp_path / "out", "--num-draws", 2]
    given += ["--executor", "local", "--output-format", "jsonl", "--keep-column", "id"]
    assert "3 files written" in run(*given)
    assert "0 files written, 3 were there" in run(*given)
    first = json.loads((tmp_path / "out" / "a.jsonl").read_text().splitlines()[0])
    assert first["id"] == "1-0"
    assert "--executor" in failing(*given[:-6], "--workers", 2)
    assert "--abstain-at-risk" in failing(*given, "--abstain-at-risk", 0.1)
    assert "--workers is for --executor ray" in failing(*given, "--workers", 2)


def test_workers_on_ray_one_of_them_killed(tmp_path, adapter, monkeypatch):
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    for number in range(6):
        write_jsonl(folder / f"{number}.jsonl", rows(number, 100))
    pd.DataFrame(rows(6, 1100)).to_parquet(folder / "6.parquet", row_group_size=300)
    monkeypatch.setattr(prediction_parts, "PART", 1024)
    here = {"num_draws": 10, "batch_size": 64}
    killed = []

    def kill_one():
        while not contents(out) if out.exists() else True:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            if not killed and "_Worker" in " ".join(process.cmdline()):
                process.kill()
                killed.append(len(contents(out)))

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with start_ray(num_cpus=2):
        done = predict_dataset(adapter, folder, out, executor="ray", workers=2, **here)
        again = predict_dataset(adapter, folder, out, executor="ray", workers=2, **here)
    assert killed
    assert killed[0] < 7
    assert (len(done.written), done.rows) == (7, 1700)
    assert (again.written, len(again.skipped)) == ([], 7)
    shutil.move(out, tmp_path / "by_ray")
    predict_dataset(adapter, folder, out, **here)
    assert contents(out) == contents(tmp_path / "by_ray")
