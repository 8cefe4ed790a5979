"""Any bytes, any table, any YAML: a result or a BaraError, within 10 seconds and 1 GiB.

`benchmarks/fuzz.py` runs the same properties with many more examples.
"""

from __future__ import annotations

import io
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from bara import BaraConfig, BaraError
from bara.bench.results import read_rows
from bara.bench.spec import Benchmark
from bara.cards.adapter_files import check_config
from bara.cli.train import parse_options
from bara.data.tables import FILE_SUFFIXES, load_table
from bara.data.text_task import TextTask
from bara.evaluation.abstention import load_threshold
from bara.finetuning.task_inputs import load_task
from bara.methods.recipe import TrainRecipe
from bara.methods.table import METHODS, TRAINING_TYPES, check_recipe
from bara.prediction.temperature import load_temperature
from bara.schema import field_types

SECONDS = 10
MEBIBYTES = 1024

settings.register_profile(
    "suite", max_examples=40, deadline=None, suppress_health_check=list(HealthCheck)
)
if settings.get_current_profile_name() == "default":
    settings.load_profile("suite")

FOLDER = Path(tempfile.mkdtemp(prefix="bara-properties-"))
slowest: dict[str, float] = {}
"""Seconds of the slowest example of each property."""
examples: dict[str, int] = {}


@contextmanager
def bounded(name: str) -> Iterator[None]:
    """What happens in the body is a result or a BaraError, in time."""
    start = time.perf_counter()
    with suppress(BaraError):
        yield
    seconds = time.perf_counter() - start
    slowest[name] = max(slowest.get(name, 0.0), seconds)
    examples[name] = examples.get(name, 0) + 1
    assert seconds < SECONDS


def peak_mebibytes() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def file(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    return path


numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, 2**63, -(2**63) - 1, 1e308, 5e-324, -0.0, 2**53 + 1]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20))
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
columns = st.sampled_from(["text", "label", "sentence", "text_pair", "target", "other", "", "a b"])
records = st.lists(st.dictionaries(columns, json_values, max_size=5), max_size=8)
cells = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "NA", "nan", "null", "01", "1", "1.0", "1e400", "inf", "-0", "true", "½"]),
    numbers.map(lambda number: repr(number) if abs(number) < 1e300 else "1e999"),
)


def learn(path: Path) -> None:
    """Everything that training does with a table before it needs a model."""
    table = load_table(path)
    tasks = []
    for kind in (None, "classification", "regression"):
        with suppress(BaraError):
            tasks.append(TextTask.infer(table, task=kind))
    for task in tasks:
        encoded = task.encode_labels(table)
        assert len(encoded) == len(table)
        if task.task == "classification":
            assert {task.label_names[i] for i in encoded} <= set(task.label_names)
        task.save(FOLDER / "text_task.json")
        assert TextTask.load(FOLDER / "text_task.json") == task
        with suppress(BaraError):
            assert all(isinstance(text, str) for text in task.texts(table)[0])


@given(st.sampled_from(FILE_SUFFIXES), st.binary(max_size=300))
def test_any_bytes_are_a_table_or_an_error(suffix: str, content: bytes) -> None:
    with bounded("bytes"):
        learn(file(f"table{suffix}", content))


@given(
    st.sampled_from([".csv", ".tsv", ".json", ".jsonl"]),
    st.text(alphabet=st.sampled_from('ab01.,\t"\r\n{}[]:-\\u \x00é'), max_size=200),
)
def test_any_text_is_a_table_or_an_error(suffix: str, content: str) -> None:
    with bounded("text"):
        learn(file(f"table{suffix}", content.encode()))


@given(st.lists(columns, min_size=1, max_size=4), st.lists(st.lists(cells, max_size=4), max_size=8))
def test_any_csv_is_a_table_or_an_error(names: list[str], rows: list[list[str]]) -> None:
    import csv

    written = io.StringIO()
    csv.writer(written).writerows([names, *rows])
    with bounded("csv"):
        learn(file("table.csv", written.getvalue().encode(errors="replace")))


@given(records, st.booleans())
def test_any_records_are_a_table_or_an_error(rows: list[dict[str, Any]], lines: bool) -> None:
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    with bounded("records"):
        learn(file("table.jsonl" if lines else "table.json", text.encode()))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), st.integers(0))
def test_any_damaged_parquet_is_a_table_or_an_error(
    changes: list[tuple[int, int]], length: int
) -> None:
    written = io.BytesIO()
    table = {"text": ["a", "b", "c"] * 5, "label": [1, 2, None] * 5, "pair": [["x"], [], None] * 5}
    parquet.write_table(pa.table(table), written)
    content = bytearray(written.getvalue())
    for place, value in changes:
        content[place % len(content)] = value
    with bounded("parquet"):
        learn(file("table.parquet", bytes(content[: len(content) - length % 7])))


recipe_fields = st.sampled_from([*field_types(TrainRecipe), *field_types(Benchmark), "x", "1"])
yaml_fields = st.dictionaries(recipe_fields, json_values, max_size=5)
benchmark: dict[str, Any] = {"model": "m", "tasks": ["digits"], "methods": ["lora"]}
yaml_texts = st.one_of(
    yaml_fields.map(json.dumps),  # which is YAML too
    yaml_fields.map(lambda fields: json.dumps(benchmark | fields)),
    st.text(max_size=100),
    st.text(alphabet=st.sampled_from("a: &*!?-[]{},|>'\"#%@\n0e1.~x"), max_size=100),
    st.binary(max_size=60),
)


@given(yaml_texts)
def test_any_yaml_is_a_recipe_or_an_error(content: str | bytes) -> None:
    raw = content.encode(errors="replace") if isinstance(content, str) else content
    path = file("recipe.yaml", raw)
    with bounded("yaml"):
        TrainRecipe.load(path)
    with bounded("yaml"):
        Benchmark.load(path)
    with bounded("yaml"):
        parse_options([raw.decode(errors="replace")])


option_names = [
    *(f"training.{name}" for name in TRAINING_TYPES),
    *(f"method_options.{name}" for name in ("r", "lora_alpha", "target_modules", "rank_pattern")),
    *("model", "data", "seed", "max_length", "task", "method", "scoring", "model_options", "x.y"),
]


@given(
    st.sampled_from([*METHODS, "bara+temperature", "bayes"]),
    st.dictionaries(st.sampled_from(option_names), json_values, max_size=4),
)
def test_any_options_are_a_recipe_or_an_error(method: str, options: dict[str, Any]) -> None:
    with bounded("options"):
        recipe = TrainRecipe(model="m", method=method).with_options(options)
        check_recipe(recipe)
        path = file("recipe.yaml", recipe.to_yaml().encode(errors="replace"))
        if "\ufffd" not in repr(options):
            assert yaml.safe_load(path.read_text("utf-8"))["method"] == recipe.method
        TrainRecipe.load(path)


FIELDS = (
    *("task", "label_names", "target_std", "target_mean", "max_length", "text_column"),
    *("scoring", "temperature", "peft_type", "r", "kl_weight", "target_modules", "rank_pattern"),
    *("warmup", "global_prior", "runtime_config", "0.1", "key"),
)
jsons = st.one_of(
    st.binary(max_size=60),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6).map(
        lambda value: json.dumps(value).encode()
    ),
)


class Model:
    """Something to keep a temperature in."""

    class config:
        pass


@given(jsons)
def test_any_file_of_an_adapter_is_read_or_an_error(content: bytes) -> None:
    names = ("text_task.json", "temperature.json", "adapter_config.json", "abstention.json")
    for name in names:
        file(name, content)
    with bounded("adapter"):
        load_task(FOLDER)
    with bounded("adapter"):
        load_temperature(Model, FOLDER)
    with bounded("adapter"):
        check_config(FOLDER / "adapter_config.json", BaraConfig)
    with bounded("adapter"):
        load_threshold(FOLDER, 0.1)
    with bounded("adapter"):
        read_rows(file("results.jsonl", content + b"\n"))


@pytest.fixture(scope="module", autouse=True)
def _memory() -> Iterator[None]:
    before = peak_mebibytes()
    yield
    shutil.rmtree(FOLDER, ignore_errors=True)
    assert peak_mebibytes() - before < MEBIBYTES
