"""Tables of texts: reading them, checking them, and turning them into model inputs."""

from __future__ import annotations

import csv
import hashlib
import io
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bara.data.text_task import TEXT_COLUMNS, TEXT_PAIR_COLUMNS
from bara.errors import BaraError, first_line
from bara.files import atomic_write_text
from bara.schema import json_text, parse_json, shown

if TYPE_CHECKING:
    from datasets import Dataset

FILE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
WRITTEN_SUFFIXES = (".jsonl", ".csv")
ALWAYS_TEXT = (*TEXT_COLUMNS, *TEXT_PAIR_COLUMNS, "prompt", "completion", "question")
"""Columns whose cells are texts, even if all of them look like numbers."""
MOST_COLUMNS = 1000
MOST_CELLS = 100_000_000


def load_table(
    source: str | Path,
    *,
    split: str | None = None,
    text_columns: Collection[str | None] = (),
) -> Dataset:
    """Read a table of texts.

    Args:
        source: a `.csv`, `.tsv`, `.jsonl`, `.json` (a list of objects) or `.parquet` file in UTF-8,
            `-` for JSONL on standard input, or the name of a hub data set (`NAME` or
            `NAME:CONFIG`).
        split: the split of a hub data set, `train` by default; only they have splits.
        text_columns: columns of a CSV file that are texts, besides those with the usual names.
            Other columns of it become numbers if all their cells are whole numbers as `str` writes
            them, or are numbers and some are fractions. `01` and `1.0` stay text.

    Raises:
        BaraError: the source is missing, empty, too large or not what its suffix says, or a file
            and there is a split.
    """
    path = Path(source)
    refuse_split(source, split)
    if str(source) == "-":
        dataset = table_from_records(read_jsonl(sys.stdin, "standard input"), "standard input")
    elif path.is_file():
        dataset = _read_file(path, {*ALWAYS_TEXT, *text_columns})
    elif path.suffix.lower() in FILE_SUFFIXES:
        raise BaraError(f"there is no file {path}; check the path")
    else:
        dataset = _load_from_hub(str(source), split or "train")
    if len(dataset) == 0:
        raise BaraError(f"{source} has no rows; give a table with at least one")
    return dataset


def refuse_split(source: str | Path, split: str | None) -> None:
    """Refuses a split of what is here, which would be read whole.

    Raises:
        BaraError: there is a split, and the source is no data set of the hub.
    """
    if split is not None and (str(source) == "-" or Path(source).exists()):
        raise BaraError(
            f"{source} is not a data set of the hub, and only those have splits: leave out the "
            f"split {shown(split)} (--split, or split of a recipe)"
        )


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
                record = parse_json(line)
            except BaraError as error:
                raise BaraError(f"{name}, line {number}: {error}") from error
            if not isinstance(record, dict):
                raise BaraError(f"{name}, line {number}: give one JSON object on each line")
            yield record
    except UnicodeDecodeError as error:
        raise BaraError(f"{name} is not UTF-8 text; convert it first") from error


def chunked(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """The rows in lists of at most `size`, each read when it is asked for."""
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk


def check_output_table(path: str) -> None:
    """Refuses a name that `write_table` does not know how to write."""
    if path != "-" and Path(path).suffix.lower() not in WRITTEN_SUFFIXES:
        raise BaraError(f"{path}: give a {' or '.join(WRITTEN_SUFFIXES)} file, or - (--output)")


def write_table(path: str, records: Sequence[dict[str, Any]]) -> None:
    """Writes rows with the same columns to a `.jsonl` or `.csv` file, or as JSONL to `-`, standard
    output.

    Raises:
        BaraError: another suffix, or the file cannot be written.
    """
    check_output_table(path)
    if Path(path).suffix.lower() == ".csv":
        atomic_write_text(path, csv_text(records))
        return
    lines = "".join(json_text(record, ensure_ascii=False) + "\n" for record in records)
    if path == "-":
        sys.stdout.write(lines)
    else:
        atomic_write_text(path, lines)


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV; its columns are all that a row has, and a cell that a row lacks is empty."""
    buffer = io.StringIO()
    columns = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def table_digest(table: Dataset) -> str:
    """A hash of a table's columns, the names of its classes, and its rows in their order."""
    classes = {name: getattr(kind, "names", None) for name, kind in table.features.items()}
    digest = hashlib.sha256(json_text(classes).encode())
    for rows in table.with_format("arrow").iter(batch_size=1000):  # which decodes no images
        digest.update(json_text(rows.to_pylist(), default=str).encode())
    return digest.hexdigest()


def _read_file(path: Path, text_columns: Collection[str | None]) -> Dataset:
    if path.stat().st_size == 0:
        raise BaraError(f"{path} is empty; give a table with at least one row")
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return _read_csv(path, text_columns)
        case ".parquet":
            return _read_parquet(path)
        case ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                return table_from_records(read_jsonl(lines, str(path)), str(path))
        case ".json":
            try:
                records = parse_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
            except BaraError as error:
                raise BaraError(f"{path} is {error}; one object a line is .jsonl") from error
            if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
                raise BaraError(f"{path} must hold a list of JSON objects")
            return table_from_records(records, str(path))
    raise BaraError(f"{path}: unknown file type; give one of {', '.join(FILE_SUFFIXES)}")


def _read_csv(path: Path, text_columns: Collection[str | None]) -> Dataset:
    import pandas as pd
    from datasets import Dataset

    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open("rb") as file:
        ends_in_crlf = file.readline().endswith(b"\r\n")
    # pandas takes a minute to find out that there are a million columns
    with (
        path.open(encoding="utf-8-sig", newline="") as lines,
        suppress(csv.Error, UnicodeDecodeError),  # pandas says what is wrong with the rest
    ):
        _check_number(len(next(csv.reader(lines, delimiter=separator), ())), str(path))
    try:
        with warnings.catch_warnings():
            # A row with too many cells would otherwise lose them with a warning only.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            cells = pd.read_csv(
                path,
                sep=separator,
                encoding="utf-8-sig",
                dtype=str,
                header=None,  # pandas would rename the second of two columns with one name
                keep_default_na=False,
                index_col=False,
                # Texts may hold a carriage return of their own, which pandas writes unquoted.
                lineterminator=None if ends_in_crlf else "\n",
            )
    except (ValueError, pd.errors.ParserWarning) as error:
        raise BaraError(f"{path} is not a readable CSV file: {first_line(error)}") from error
    names = [name or f"Unnamed: {i}" for i, name in enumerate(cells.iloc[0].fillna(""))]
    _check_columns(names, str(path))
    frame = cells.iloc[1:].set_axis(names, axis=1)
    for column in [name for name in names if name not in text_columns]:
        frame[column] = _as_numbers(frame[column])
    return Dataset.from_pandas(frame, preserve_index=False)


def _as_numbers(texts: Any) -> Any:
    """A column of texts as numbers, if classes can still be told by how they were written."""
    import pandas as pd

    given = texts.mask(texts.str.lower().isin(["", "na", "nan", "null"]))
    if not given.notna().any():
        return texts
    if given.dropna().str.fullmatch(r"0|-?[1-9]\d{0,17}").all():
        return given.astype("Int64")
    numbers = pd.to_numeric(given, errors="coerce").astype("float64")
    if not numbers.isna().equals(given.isna()):
        return texts
    return numbers if (numbers.dropna() % 1 != 0).any() else given


def _check_number(columns: int, name: str) -> None:
    """Refuses a table with more columns than a table of texts."""
    if columns > MOST_COLUMNS:
        raise BaraError(
            f"{name} has {columns:,} columns; give a table with {MOST_COLUMNS:,} or fewer"
        )


def _check_columns(names: Sequence[str], name: str) -> None:
    """Refuses a table that has a column twice, or too many of them."""
    _check_number(len(names), name)
    if null := next((column for column in names if "\0" in column), None):
        raise BaraError(f"{name}: the column {shown(null)} has a null character in its name")
    twice = next((column for i, column in enumerate(names) if column in names[:i]), None)
    if twice is not None:
        raise BaraError(f"{name} has two columns named {shown(twice)}; rename or drop one")


def _read_parquet(path: Path) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    try:
        size = parquet.read_metadata(path)
        _check_columns(parquet.read_schema(path).names, str(path))
        if size.num_rows * size.num_columns > MOST_CELLS:
            raise BaraError(
                f"{path} has {size.num_rows:,} rows; give a table of {MOST_CELLS:,} cells or fewer"
            )
        return Dataset(InMemoryTable(parquet.read_table(path)))
    except BaraError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise BaraError(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def parquet_length(path: Path) -> int:
    """Rows of a Parquet file; 0 for what is none, which reading it says."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError, ValueError):
        return 0


def parquet_rows(path: Path, first: int, last: int) -> Dataset:
    """Rows of a Parquet file from `first` on and before `last`, counted from 0.

    The row groups that they are in are read, and no others.

    Raises:
        BaraError: the file is damaged, has a column twice, or these row groups are too large.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, str(path))
            groups: list[int] = []
            start = rows = end = 0
            for number in range(file.num_row_groups):
                begin, end = end, end + file.metadata.row_group(number).num_rows
                if begin < last and end > first:
                    start = start if groups else begin
                    groups.append(number)
                    rows += end - begin
            if rows * file.metadata.num_columns > MOST_CELLS:
                raise BaraError(
                    f"{path} has {rows:,} rows in row groups {groups[0]} to {groups[-1]}; write it "
                    f"with smaller ones, {MOST_CELLS:,} cells at most are read at a time"
                )
            table = file.read_row_groups(groups)
        return Dataset(InMemoryTable(table.slice(first - start, last - first)))
    except BaraError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise BaraError(f"{path} is not a readable Parquet file: {first_line(error)}") from error


def table_from_records(
    records: Iterable[dict[str, Any]], name: str, *, first_row: int = 1
) -> Dataset:
    """A table of its rows; what a row lacks is empty.

    Raises:
        BaraError: a column has values of types that do not go together; the message has the first.
    """
    import pyarrow as pa
    from datasets import Dataset

    rows = list(records)
    columns: dict[str, list[Any]] = {key: [] for row in rows for key in row}
    _check_columns(list(columns), name)
    for key, values in columns.items():
        values.extend(row.get(key) for row in rows)
    try:
        return Dataset.from_dict(columns)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise BaraError(f"{name}: {_mixed(columns, first_row)}: {first_line(error)}") from error


def _mixed(columns: dict[str, list[Any]], first_row: int) -> str:
    """The first column with values of different types, and its first row that differs."""
    for name, values in columns.items():
        given = [(row, value) for row, value in enumerate(values, first_row) if value is not None]
        for row, value in given:
            numbers = isinstance(value, int | float) and isinstance(given[0][1], int | float)
            if type(value) is not type(given[0][1]) and not numbers:
                return f"column {name!r} mixes types, with {shown(value)} in row {row}"
    return "a column mixes types"


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
