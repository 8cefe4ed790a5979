"""The results file: one JSON object a line for each finished cell."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bara.data.tables import csv_text
from bara.errors import BaraError
from bara.files import atomic_write_text
from bara.schema import json_text, parse_json

Row = dict[str, Any]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Put a row at the end of the file, whole, and on the disk when this returns.

    What an earlier process left of a line when it was killed goes first.

    Raises:
        BaraError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.truncate(_whole_lines(file))
            file.write(json_text(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BaraError(f"cannot write {path}: {error.strerror}") from error


def _whole_lines(file: Any) -> int:
    """Length of the file up to the end of its last whole line."""
    file.seek(0)
    content = file.read()
    return content.rfind(b"\n") + 1


def read_rows(path: Path) -> dict[str, Row]:
    """The latest row of each cell by its key; a cell that only ever failed has an `error`.

    Raises:
        BaraError: a line is damaged.
    """
    rows: dict[str, Row] = {}
    for row in read_lines(path, required="key"):
        if "error" not in row or "error" in rows.get(row["key"], row):
            rows[row["key"]] = row
    return rows


def read_lines(path: Path, required: str | None = None) -> list[Row]:
    """All rows of the file, which may be missing; a last line that was cut off is left out.

    Args:
        path: what `append_row` wrote.
        required: a name that every row must have, with a text.

    Raises:
        BaraError: a line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # after the last newline: a cut line, or nothing
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            if not isinstance(row, dict) or (required and not isinstance(row.get(required), str)):
                raise BaraError("not a row")
        except BaraError as error:
            raise BaraError(f"{path}, line {number} is damaged; remove it and run again") from error
        rows.append(row)
    return rows


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """The numbers and texts of the rows as a table, nested ones as `shift.typo-1.nll`.

    Raises:
        BaraError: it cannot be written.
    """
    atomic_write_text(path, csv_text([dict(_flat(row)) for row in rows]))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{name}.")
        elif not isinstance(item, list):
            yield f"{prefix}{name}", item
