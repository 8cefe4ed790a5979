"""A benchmark from start to end: what is missing is run, and everything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from bara.bench.results import Row, append_row, read_rows
from bara.bench.spec import Benchmark, Cell
from bara.files import only_writer as exclusive

RESULTS_FILE = "results.jsonl"
OF_CELL = ("benchmark", "name", "task", "seed", "train_size", "rank", "epochs")
"""What a row has from its cell, whatever the file says."""
Executor = Callable[[Sequence[Cell]], Iterable[Row]]


def only_writer(folder: Path) -> AbstractContextManager[None]:
    """Keeps a second run away from the results, for as long as the context lasts.

    Raises:
        BaraError: another process is in here already.
    """
    return exclusive(
        folder / f"{RESULTS_FILE}.lock",
        f"another `bara bench` is writing to {folder}; wait for it, or give another folder "
        "(--output)",
    )


def pending(benchmarks: Iterable[Benchmark], folder: Path) -> list[Cell]:
    """The cells that have no result yet, each once; failed ones are among them."""
    done = read_rows(folder / RESULTS_FILE)
    cells: dict[str, Cell] = {}
    for benchmark in benchmarks:
        for cell in benchmark.cells():
            if "error" in done.get(cell.key, {"error": "not run"}):
                cells.setdefault(cell.key, cell)
    return list(cells.values())


def run_cells(cells: Sequence[Cell], folder: Path, executor: Executor) -> Iterator[Row]:
    """Run cells, write each row to the results file as it comes, then yield it."""
    for row in executor(cells):
        append_row(folder / RESULTS_FILE, row)
        yield row


def finished(benchmark: Benchmark, folder: Path) -> list[Row]:
    """The rows of a benchmark's cells that have a result, in the benchmark's order.

    Two benchmarks with a cell in common share its row; each has its own names for it.
    """
    rows = read_rows(folder / RESULTS_FILE)
    return [
        rows[cell.key] | {name: getattr(cell, name) for name in OF_CELL}
        for cell in benchmark.cells()
        if "error" not in rows.get(cell.key, {"error": "not run"})
    ]
