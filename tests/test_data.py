"""Reading tables, encoding labels, refusing what cannot be learnt from."""

from __future__ import annotations

import io
import json
import statistics
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from bara import BaraError
from bara.data.examples import canonical_text, load_news, load_sentiment, minilm_path
from bara.data.tables import load_table
from bara.data.text_task import TextTask, split_dataset
from conftest import write_jsonl

ROWS = [
    {"text": "good film", "label": "pos", "score": 2.5},
    {"text": "bad, bad film", "label": "neg", "score": -1.0},
    {"text": 'a "fine"\nfilm', "label": "pos", "score": 0.0},
]


@pytest.fixture
def table() -> Dataset:
    return Dataset.from_list(ROWS)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path: Path, table: Dataset, suffix: str) -> None:
    path = tmp_path / f"table.{suffix}"
    if suffix in ("csv", "tsv"):
        table.to_pandas().to_csv(path, sep="," if suffix == "csv" else "\t", index=False)
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "jsonl":
        write_jsonl(path, ROWS)
    else:
        table.to_parquet(path)
    assert load_table(path).to_list() == ROWS


def test_csv_keeps_carriage_returns_and_the_word_null(tmp_path: Path) -> None:
    unix = tmp_path / "unix.csv"
    unix.write_bytes(b"text,label\none\rtwo,1\nnull,\n")
    assert load_table(unix).to_list() == [
        {"text": "one\rtwo", "label": 1.0},
        {"text": "null", "label": None},
    ]
    windows = tmp_path / "windows.csv"
    windows.write_bytes(b"\xef\xbb\xbftext,label\r\none,1\r\n")
    assert load_table(windows).to_list() == [{"text": "one", "label": 1}]


def test_standard_input_is_jsonl(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert load_table("-").to_list() == ROWS


@pytest.mark.parametrize("source", ["table.jsonl", "-"])
def test_a_split_of_what_is_here_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    name = source if source == "-" else str(tmp_path / source)
    with pytest.raises(BaraError, match="only those have splits: leave out the split 'test'"):
        load_table(name, split="test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "there is no file"),
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"text,label\n", "has no rows"),
        ("empty.jsonl", b"\n\n", "has no rows"),
        ("wide.csv", b"text,label\na,1,2\n", "not a readable CSV"),
        ("late.csv", b"text,label\na,1\nb,1,2\n", "line 3"),
        ("latin.csv", "text,label\ncafé,1\n".encode("latin-1"), "utf-8"),
        ("latin.jsonl", '{"text": "café"}'.encode("latin-1"), "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("list.jsonl", b"[1]\n", "one JSON object on each line"),
        (
            "mixed.jsonl",
            b'{"label": 1}\n{"label": "a"}\n',
            "column 'label' mixes types, with 'a' in row 2",
        ),
        ("bad.json", b'{"text": "a"}', "a list of JSON objects"),
        ("bad.parquet", b"PAR1 and no more", "not a readable Parquet"),
        ("table.xlsx", b"PK", "unknown file type"),
    ],
)
def test_unreadable_files_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BaraError, match=message) as caught:
        load_table(path)
    assert "\n" not in str(caught.value)


def test_infers_columns_and_sorted_classes(table: Dataset) -> None:
    task = TextTask.infer(table)
    assert (task.text_column, task.label_column, task.text_pair_column) == ("text", "label", None)
    assert task.task == "classification"
    assert task.label_names == ("neg", "pos")
    assert task.encode_labels(table) == [1, 0, 1]
    assert task == TextTask.infer(table.select([2, 1, 0]))


def test_integer_classes_are_sorted_by_value() -> None:
    table = Dataset.from_dict({"text": ["a", "b", "c"], "label": [10, 9, 100]})
    task = TextTask.infer(table)
    assert task.label_names == ("9", "10", "100")
    assert task.encode_labels(table) == [1, 0, 2]
    as_text = Dataset.from_dict({"text": ["a", "b"], "label": ["100", "9"]})
    assert task.encode_labels(as_text) == [2, 0]


def test_class_label_features_keep_their_order() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a"])})
    table = Dataset.from_dict({"text": ["one", "two"], "label": [1, 0]}, features=features)
    task = TextTask.infer(table)
    assert task.label_names == ("z", "a")
    assert task.encode_labels(table) == [1, 0]


def test_regression_is_inferred_and_standardised(table: Dataset) -> None:
    task = TextTask.infer(table, label_column="score")
    assert task.task == "regression"
    assert task.num_labels == 2
    scores = [row["score"] for row in ROWS]
    mean, std = statistics.mean(scores), statistics.pstdev(scores)
    assert task.encode_labels(table) == pytest.approx([(s - mean) / std for s in scores])


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {},
            {"text_column": "texts"},
            r"no column 'texts' \(--text-column\); the columns are 'text', 'label'",
        ),
        ({}, {"label_column": "y"}, r"no column 'y'"),
        ({}, {"text_pair_column": "other"}, r"no column 'other'"),
        ({}, {"task": "ranking"}, r"task must be"),
        ({}, {"task": "regression"}, r"'a' in row 1, not a number"),
        ({"label": ["a", "a", "a"]}, {}, r"only the class 'a'"),
        ({"label": ["a", None, "b"]}, {}, r"'label' is empty, NaN or infinite in row 2"),
        ({"label": [1.5, float("nan"), 2.0]}, {}, r"'label' is empty, NaN or infinite in row 2"),
        ({"label": [1.5, 2.0, float("inf")]}, {}, r"infinite in row 3"),
        ({"label": ["1.5", "NaN", "2"]}, {"task": "regression"}, r"NaN or infinite in row 2"),
        ({"label": [1.5, 1.5, 1.5]}, {}, r"every target in column 'label' is 1.5"),
        ({"label": [1.5, 2.5, 1.0]}, {"task": "classification"}, r"fractional numbers"),
        ({"words": ["a", "b", "c"], "text": None}, {}, r"which column has the text\?"),
    ],
)
def test_unlearnable_tables_are_refused(
    columns: dict[str, list[object] | None], options: dict[str, str], message: str
) -> None:
    base = {"text": ["one", "two", "three"], "label": ["a", "b", "a"]}
    merged = {key: value for key, value in {**base, **columns}.items() if value is not None}
    with pytest.raises(BaraError, match=message) as caught:
        TextTask.infer(Dataset.from_dict(merged), **options)
    assert "\n" not in str(caught.value)


def test_unseen_labels_are_named(table: Dataset) -> None:
    task = TextTask.infer(table)
    other = Dataset.from_dict({"text": ["x", "y", "z"], "label": ["pos", "meh", "so-so"]})
    with pytest.raises(BaraError, match=r"'meh', 'so-so' \(first in row 2\).*knows 'neg', 'pos'"):
        task.encode_labels(other)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["good", "", None, " "], r"'text' is empty in rows 2, 3, 4"),
        ([1, 2, 3, 4], r"not text \(1\)"),
    ],
)
def test_texts_that_are_none_are_refused(
    table: Dataset, texts: list[object], message: str, tiny_tokenizer: object
) -> None:
    bad = Dataset.from_dict({"text": texts, "label": ["pos"] * 4})
    with pytest.raises(BaraError, match=message):
        TextTask.infer(table).inputs(bad, tiny_tokenizer)


def test_tokenise_equals_the_tokenizer_row_by_row(table: Dataset, tiny_tokenizer) -> None:
    task = TextTask.infer(table, max_length=5)
    inputs = task.inputs(table, tiny_tokenizer)
    for row, text in zip(inputs, table["text"], strict=True):
        alone = tiny_tokenizer(text, truncation=True, max_length=5)
        assert row["input_ids"] == alone["input_ids"]
        assert row["attention_mask"] == alone["attention_mask"]
        assert len(row["input_ids"]) <= 5
    assert list(inputs["labels"]) == [1, 0, 1]
    assert "labels" not in task.inputs(table, tiny_tokenizer, labels=False).column_names


def test_pairs_are_tokenised_together(tiny_tokenizer) -> None:
    table = Dataset.from_dict(
        {"sentence1": ["good film"], "sentence2": ["bad food"], "label": ["a"]}
    )
    task = TextTask("sentence1", "label", "sentence2", label_names=("a", "b"))
    row = task.inputs(table, tiny_tokenizer)[0]
    assert row["input_ids"] == tiny_tokenizer("good film", "bad food")["input_ids"]
    assert 1 in row["token_type_ids"]


def test_task_survives_a_file(tmp_path: Path, table: Dataset) -> None:
    task = TextTask.infer(table)
    task.save(tmp_path / "task.json")
    assert TextTask.load(tmp_path / "task.json") == task
    (tmp_path / "task.json").write_text("{}")
    with pytest.raises(BaraError, match="does not describe a task"):
        TextTask.load(tmp_path / "task.json")


def test_split_is_seeded_stratified_and_disjoint() -> None:
    labels = ["a"] * 40 + ["b"] * 20
    table = Dataset.from_dict({"text": [str(i) for i in range(60)], "label": labels})
    rest, test = split_dataset(table, 0.25, seed=3, label_column="label")
    assert Counter(test["label"]) == {"a": 10, "b": 5}
    assert sorted([*rest["text"], *test["text"]], key=int) == list(table["text"])
    assert list(split_dataset(table, 15, seed=3, label_column="label")[1]["text"]) == list(
        test["text"]
    )
    assert list(split_dataset(table, 15, seed=4)[1]["text"]) != list(test["text"])


def test_split_of_a_rare_class_is_not_stratified_but_works() -> None:
    table = Dataset.from_dict({"text": ["x"] * 5, "label": ["a", "a", "a", "a", "b"]})
    assert [len(part) for part in split_dataset(table, 2, label_column="label")] == [3, 2]
    with pytest.raises(BaraError, match="both parts must have some"):
        split_dataset(table, 5)


def test_bundled_sentiment_has_no_text_in_two_tables() -> None:
    tables = load_sentiment(50, 60, 40, seed=1)
    assert [len(table) for table in tables] == [50, 40, 60]
    texts = [canonical_text(text) for table in tables for text in table["text"]]
    assert len(set(texts)) == 150
    assert {label for table in tables for label in table["label"]} == {
        "negative",
        "neutral",
        "positive",
    }
    assert list(load_sentiment(50, 60, 40, seed=1).test["text"]) == list(tables.test["text"])
    with pytest.raises(BaraError, match=r"were asked for.*\(--num-train, --num-test\)"):
        load_sentiment(10**6)


def test_copies_of_a_tweet_are_one_text() -> None:
    tweet = "Never going to use a driverless car, not even once"
    copy = "RT @someone: Never going to use a driverless car - not ev... http://t.co/x"
    assert canonical_text(tweet) == canonical_text(copy)


def test_bundled_news_and_model() -> None:
    news = load_news(20)
    assert len(news) == 20
    assert all(text.strip() for text in news["text"])
    assert (minilm_path() / "model.safetensors").is_file()


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bara.data.examples.find_spec", lambda name: None)
    with pytest.raises(BaraError, match=r'pip install "bara-peft\[quickstart\]"'):
        minilm_path()


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (["01", "02", "01"], ("01", "02")),
        (["1", "2", "10"], ("1", "2", "10")),
        (["1.0", "2.0", "10.0"], ("1.0", "2.0", "10.0")),
        (["1e3", "2e3", "1e3"], ("1e3", "2e3")),
        (["12345678901234567890", "12345678901234567891", "12345678901234567890"], None),
        (["9007199254740993", "9007199254740992", "9007199254740993"], None),
        (["-0", "0", "0"], ("-0", "0")),
        (["007", "7", "007"], ("007", "7")),
        (["true", "false", "true"], ("false", "true")),
    ],
)
def test_classes_of_a_csv_keep_their_spelling(
    tmp_path: Path, cells: list[str], names: tuple[str, ...] | None
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text,label\n" + "".join(f"film,{cell}\n" for cell in cells))
    table = load_table(path)
    task = TextTask.infer(table)
    assert task.task == "classification"
    assert set(task.label_names) == set(cells)
    if names is not None:
        assert task.label_names == names
    assert [task.label_names[i] for i in task.encode_labels(table)] == cells


def test_targets_of_a_csv_are_numbers_however_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text,label\na,1.50\nb,-2\nc,1e1\nd,007\n")
    task = TextTask.infer(load_table(path))
    assert task.task == "regression"
    assert task.target_mean == pytest.approx((1.5 - 2 + 10 + 7) / 4)
    path.write_text("text,label\na,01\nb,02\n")
    assert TextTask.infer(load_table(path), task="regression").target_mean == 1.5


def test_labels_of_other_files_are_the_classes_with_the_same_number() -> None:
    """So an adapter that was trained when `01` became `1` still knows its labels."""
    texts = ["a", "b", "c"]
    old = TextTask(label_names=("1", "2", "x"))
    assert old.encode_labels(Dataset.from_dict({"text": texts, "label": ["01", "2.0", "x"]})) == [
        0,
        1,
        2,
    ]
    codes = TextTask(label_names=("01", "02"))
    assert codes.encode_labels(Dataset.from_dict({"text": texts, "label": [1, 2, 1]})) == [0, 1, 0]
    twice = TextTask(label_names=("01", "1"))
    assert twice.encode_labels(Dataset.from_dict({"text": texts, "label": ["1", "01", "1"]})) == [
        1,
        0,
        1,
    ]
    with pytest.raises(BaraError, match=r"'1\.0'"):
        twice.encode_labels(Dataset.from_dict({"text": ["a"], "label": ["1.0"]}))


def test_codes_that_are_missing_are_no_class(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text,label\na,01\nb,NA\nc,02\n")
    with pytest.raises(BaraError, match="'label' is empty, NaN or infinite in row 2"):
        TextTask.infer(load_table(path))


def test_texts_of_a_csv_that_are_numbers_stay_texts(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text,body,label\n007,1.50,a\n42,2,b\n")
    assert load_table(path)["text"][:] == ["007", "42"]
    table = load_table(path, text_columns=("body", None))
    task = TextTask.infer(table, text_column="body")
    assert task.texts(table) == [["1.50", "2"]]


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text,label,label\na,1,2\nb,2,1\n")
    with pytest.raises(BaraError, match="two columns named 'label'"):
        load_table(path)
    path = tmp_path / "table.jsonl"
    path.write_text('{"text": "a", "label": 1, "label": 2}\n')
    with pytest.raises(BaraError, match=r"line 1: not JSON that can be read.*'label'.*twice"):
        load_table(path)


@pytest.mark.parametrize(
    "labels",
    [[["good"], ["bad"], ["good"]], [{"a": "x"}, {"a": "y"}, {"a": "x"}], [b"a", b"b", b"a"]],
)
def test_labels_that_are_no_labels_are_refused(labels: list[object]) -> None:
    table = Dataset.from_dict({"text": ["a", "b", "c"], "label": labels})
    with pytest.raises(BaraError, match=r"column 'label' has .* in row 1; a label is a text"):
        TextTask.infer(table)
    with pytest.raises(BaraError, match="a label is a text"):
        TextTask(label_names=("a", "b")).encode_labels(table)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([1e100, 2.5, 1.0], r"targets up to 1e\+100, too large for 32-bit"),
        ([1.5e-20, 2.5e-20, 0.0], "standard deviation of .*, too small for 32-bit"),
    ],
)
def test_targets_that_predictions_cannot_hold_are_refused(
    targets: list[float], message: str
) -> None:
    table = Dataset.from_dict({"text": ["a", "b", "c"], "label": targets})
    with pytest.raises(BaraError, match=message):
        TextTask.infer(table, task="regression")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("deep.jsonl", b'{"text": ' + b"[" * 10**5, "line 1: not JSON that can be read"),
        ("deep.json", b"[" * 10**5, "not JSON that can be read"),
        ("long.jsonl", b'{"label": ' + b"9" * 5000 + b"}\n", "line 1: not JSON that can be read"),
        ("long.json", b'[{"label": ' + b"9" * 5000 + b"}]", "not JSON that can be read"),
        ("large.jsonl", b'{"label": ' + b"9" * 4000 + b"}\n", "a column mixes types"),
        ("latin.json", '[{"text": "café"}]'.encode("latin-1"), "not UTF-8"),
        ("wide.csv", b"," * 10**6 + b"\n", "columns; give a table with 1,000 or fewer"),
        (
            "wide.jsonl",
            b"".join(b'{"c%d": 1}\n' % i for i in range(10**4)),
            "columns; give a table with 1,000 or fewer",
        ),
    ],
)
def test_files_that_blow_up_are_refused_at_once(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BaraError, match=message) as caught:
        load_table(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
