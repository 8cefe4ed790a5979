"""What a worker predicts at a time: a table, or a part of a long one; and one file of the parts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bara.data.tables import parquet_length
from bara.errors import BaraError, first_line
from bara.files import atomic_file

CHUNK = 1024
"""Texts that are predicted at a time: the same however a table is cut, and so the batches."""
PART = 64 * CHUNK
"""Rows of a part."""


class Unit(NamedTuple):
    """Rows of a table and where their predictions go.

    Attributes:
        source: the table.
        target: the file.
        first, last: rows from `first` on and before `last`; 0 and 0 are all of them.
    """

    source: str
    target: str
    first: int = 0
    last: int = 0


def units_of(source: Path, target: Path) -> list[Unit]:
    """The table, or its parts if it is in Parquet, which alone can be read from the middle."""
    length = parquet_length(source) if source.suffix.lower() == ".parquet" else 0
    if length <= PART:
        return [Unit(str(source), str(target))]
    ends = [(first, min(first + PART, length)) for first in range(0, length, PART)]
    names = [f"{first:012}-{last:012}{target.suffix}" for first, last in ends]
    folder = _folder(target)
    return [
        Unit(str(source), str(folder / name), first, last)
        for name, (first, last) in zip(names, ends, strict=True)
    ]


def join(units: Sequence[Unit], target: Path) -> None:
    """Makes one file of the predictions of parts, and removes these.

    Raises:
        BaraError: it cannot be written, or the parts have different columns.
    """
    if len(units) > 1:
        parts = [Path(unit.target) for unit in units]
        if target.suffix == ".parquet":
            _join_parquet(parts, target)
        else:
            _join_texts(parts, target)
    shutil.rmtree(_folder(target), ignore_errors=True)


def _folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.parts")


def _join_texts(parts: Sequence[Path], target: Path) -> None:
    head = b""
    with atomic_file(target) as whole:
        for part in parts:
            with part.open("rb") as file:
                if target.suffix == ".csv":
                    line = _header(file)
                    if not head:
                        whole.write(line)
                    elif line != head:
                        raise BaraError(f"the columns of {parts[0]} and {part} are not the same")
                    head = line
                shutil.copyfileobj(file, whole)


def _header(file: BinaryIO) -> bytes:
    """The first row of a CSV file, in whose names there may be line breaks."""
    line = file.readline()
    while line.count(b'"') % 2 and (more := file.readline()):
        line += more
    return line


def _join_parquet(parts: Sequence[Path], target: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        # a column that is empty in one part has no type there
        schemas = [parquet.read_schema(part) for part in parts]
        schema = pa.unify_schemas(schemas, promote_options="permissive")
        with atomic_file(target) as file, parquet.ParquetWriter(file, schema) as writer:
            for part in parts:
                writer.write_table(parquet.read_table(part).cast(schema))
    except pa.ArrowException as error:
        line = first_line(error)
        raise BaraError(f"the columns of its parts are not the same: {line}") from error
