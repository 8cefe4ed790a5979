"""What the commands share about the terminal they run in."""

from __future__ import annotations

import codecs
import os
import shlex
import subprocess
import sys
from collections.abc import Sized
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from typer import Context


def console(*, stderr: bool = False) -> Console:
    """A console that shows text as it is: paths and names may hold brackets and colons."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def use_utf8() -> None:
    """Pipes hold UTF-8 everywhere; Windows would take the encoding of the region."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(encoding="utf-8")


def say_next(*commands: list[object], aside: bool = False) -> None:
    """What to do after this command, as it is typed; words in capitals are to be filled in.

    Args:
        *commands: words of each.
        aside: on standard error, where standard output is something to keep.
    """
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    stream = sys.stderr if aside else sys.stdout
    print("Next:", file=stream)
    for command in commands:
        print(" ", join([str(word) for word in command]), file=stream)


def say_calibrate(adapter: Path, *, regression: bool = False) -> None:
    """After predictions: how good they are, and above which uncertainty to abstain."""
    calibrate = [] if regression else ["--calibrate-risk", 0.1]
    say_next(["bara", "evaluate", adapter, "--data", "LABELLED", *calibrate])


def say_train(adapter: Path) -> None:
    """After rows have got labels: the adapter's training with them."""
    from bara.cards.adapter_files import RECIPE_FILE

    config = ["--config", adapter / RECIPE_FILE]
    say_next(["bara", "train", *config, "--data", "LABELLED", "--output", "FOLDER"])


def say_without_dry_run(context: Context, *more: str) -> None:
    """After a dry run: what was typed, in earnest."""
    say_next(["bara", *(word for word in context.obj if word != "--dry-run"), *more], aside=True)


def row_count(rows: object, data: str | None) -> int | None:
    """How many rows there are, so that a bar can tell the time left; None of what streams in."""
    if isinstance(rows, Sized):
        return len(rows)
    if data is None or not Path(data).is_file():
        return None
    with open(data, "rb") as lines:
        return sum(bool(line.strip()) for line in lines)


def require_output(output: Path, adapter: Path, force: bool) -> None:
    """Refuses to write over the adapter itself, or without --force over anything."""
    from bara.errors import BaraError
    from bara.files import require_new

    if os.path.realpath(output) == os.path.realpath(adapter):
        raise BaraError(f"{output} is the adapter itself; give another --output")
    require_new(output, force)


def calibration_inputs(data: str, held_out: str | None, tokenizer: Any, task: Any) -> Any:
    """Tokenised texts to fit on, and others to measure on: the second table, or every second text.

    Raises:
        BaraError: a table cannot be read, or there are fewer than two texts to share out.
    """
    from bara.errors import BaraError
    from bara.finetuning.task_inputs import read_table

    fit = read_table(data, task)
    if held_out is not None:
        measure = read_table(held_out, task)
    elif len(fit) < 2:
        raise BaraError(f"{data} has one text: give two at least, or --held-out")
    else:
        numbers = range(len(fit))
        fit, measure = fit.select(numbers[::2]), fit.select(numbers[1::2])
    return tuple(task.inputs(part, tokenizer, labels=False) for part in (fit, measure))


def update_card(adapter: Path, **measured: Any) -> None:
    """Writes what was measured into the adapter's README.md, if its folder is the user's own."""
    from bara.reports.measured_card import write_model_card

    if os.access(adapter, os.W_OK):
        write_model_card(adapter, **measured)


def extended_rows(
    table: Any, index: list[int], columns: dict[str, list[Any]], name: str
) -> list[dict[str, Any]]:
    """Rows of a table in a new order: their number in it, what was found of each, and themselves.

    Raises:
        BaraError: the table has one of these columns already.
    """
    from bara.errors import BaraError

    for column in ("row", *columns):
        if column in table.column_names:
            raise BaraError(f"{name} has a column {column!r} already: rename it or leave it out")
    found = zip(*columns.values(), strict=True)
    return [
        {"row": i + 1, **dict(zip(columns, values, strict=True)), **table[i]}
        for i, values in zip(index, found, strict=True)
    ]
