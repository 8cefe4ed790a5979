"""Tables of texts: reading them, checking them, and turning them into model inputs."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bara.errors import BaraError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

FILE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def load_table(source: str | Path, *, split: str | None = None) -> Dataset:
    """Read a table of texts.

    Args:
        source: a `.csv`, `.tsv`, `.jsonl`, `.json` (a list of objects) or `.parquet` file in UTF-8,
            `-` for JSONL on standard input, or the name of a hub data set (`NAME` or
            `NAME:CONFIG`).
        split: the split of a hub data set, `train` by default; files have none.

    Raises:
        BaraError: the source is missing, empty or not what its suffix says.
    """
    path = Path(source)
    if str(source) == "-":
        dataset = table_from_records(read_jsonl(sys.stdin, "standard input"), "standard input")
    elif path.is_file():
        dataset = _read_file(path)
    elif path.suffix.lower() in FILE_SUFFIXES:
        raise BaraError(f"there is no file {path}; check the path")
    else:
        dataset = _load_from_hub(str(source), split or "train")
    if len(dataset) == 0:
        raise BaraError(f"{source} has no rows; give a table with at least one")
    return dataset


def read_jsonl(lines: Iterable[str], name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL stream, blank lines left out.

    Raises:
        BaraError: a line is not a JSON object; the message has its number.
    """
    try:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise BaraError(f"{name}, line {number}: not JSON ({error.msg})") from error
            if not isinstance(record, dict):
                raise BaraError(f"{name}, line {number}: give one JSON object on each line")
            yield record
    except UnicodeDecodeError as error:
        raise BaraError(f"{name} is not UTF-8 text; convert it first") from error


def _read_file(path: Path) -> Dataset:
    if path.stat().st_size == 0:
        raise BaraError(f"{path} is empty; give a table with at least one row")
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return _read_csv(path)
        case ".parquet":
            return _read_parquet(path)
        case ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                return table_from_records(read_jsonl(lines, str(path)), str(path))
        case ".json":
            try:
                records = json.loads(path.read_text(encoding="utf-8-sig"))
            except ValueError as error:
                raise BaraError(
                    f"{path} is not JSON ({error}); one object a line is .jsonl"
                ) from error
            if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
                raise BaraError(f"{path} must hold a list of JSON objects")
            return table_from_records(records, str(path))
    raise BaraError(f"{path}: unknown file type; give one of {', '.join(FILE_SUFFIXES)}")


def _read_csv(path: Path) -> Dataset:
    import pandas as pd
    from datasets import Dataset

    with path.open("rb") as file:
        ends_in_crlf = file.readline().endswith(b"\r\n")
    try:
        with warnings.catch_warnings():
            # A row with too many cells would otherwise lose them with a warning only.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path,
                sep="\t" if path.suffix.lower() == ".tsv" else ",",
                encoding="utf-8-sig",
                dtype=str,
                keep_default_na=False,
                index_col=False,
                # Texts may hold a carriage return of their own, which pandas writes unquoted.
                lineterminator=None if ends_in_crlf else "\n",
            )
    except (ValueError, pd.errors.ParserWarning) as error:
        raise BaraError(f"{path} is not a readable CSV file: {first_line(error)}") from error
    for column in frame.columns:
        given = frame[column].mask(frame[column].str.lower().isin(["", "na", "nan", "null"]))
        numbers = pd.to_numeric(given, errors="coerce")
        if given.notna().any() and numbers.isna().equals(given.isna()):
            frame[column] = numbers
    return Dataset.from_pandas(frame, preserve_index=False)


def _read_parquet(path: Path) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    try:
        return Dataset(InMemoryTable(parquet.read_table(path)))
    except (pa.ArrowException, OSError) as error:
        raise BaraError(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def table_from_records(records: Iterable[dict[str, Any]], name: str) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    rows = list(records)
    columns: dict[str, list[Any]] = {key: [] for row in rows for key in row}
    for key, values in columns.items():
        values.extend(row.get(key) for row in rows)
    try:
        return Dataset.from_dict(columns)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise BaraError(f"{name}: a column mixes types: {first_line(error)}") from error


def _load_from_hub(name: str, split: str) -> Dataset:
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    try:
        return load_dataset(repository, config or None, split=split)
    except Exception as error:  # the hub client raises many unrelated types
        raise BaraError(
            f"{name!r} is neither a file here ({', '.join(FILE_SUFFIXES)}) nor a hub data set with "
            f"a split {split!r} that can be loaded: {first_line(error)}"
        ) from error
