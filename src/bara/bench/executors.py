"""Running cells side by side: on this machine, or on a Ray cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from bara.bench.results import Row
from bara.bench.spec import Cell
from bara.errors import last_line
from bara.machine import map_on_ray

LOG_LENGTH = 4000
"""Characters that are kept of what a failed cell printed."""

WORKER = [sys.executable, "-m", "bara.bench.worker"]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_local(cells: Sequence[Cell], *, workers: int, threads: int = 1) -> Iterator[Row]:
    """Run every cell in a process of its own, `workers` at a time, and yield rows as they come.

    A cell that fails, or whose process is killed, gives a row with its `error`. When this process
    ends, however it does, its workers end too.

    Args:
        cells: what to run, in this order.
        workers: processes at a time.
        threads: CPU threads of each.
    """
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(threads))
    running: set[subprocess.Popen[str]] = set()
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(_run_process, cell, environment, running) for cell in cells]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running.copy():
            process.terminate()


def _run_process(
    cell: Cell, environment: dict[str, str], running: set[subprocess.Popen[str]]
) -> Row:
    start = time.perf_counter()
    with subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    ) as process:
        running.add(process)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            # Standard input stays open: its end tells the worker that this process has ended.
            process.stdin.write(json.dumps(asdict(cell)) + "\n")
            process.stdin.flush()
            with ThreadPoolExecutor(1) as reader:
                errors = reader.submit(process.stderr.read)
                output = process.stdout.read()
                message = errors.result().strip()
            code = process.wait()
        except BrokenPipeError:
            output, message, code = "", "", process.wait()
        finally:
            running.discard(process)
    if code == 0:
        row: Row = json.loads(output)
        return row
    ended = f"the process ended with signal {-code}" if code < 0 else f"exit code {code}"
    return failed(cell, message.splitlines()[-1] if message and code > 0 else ended, start, message)


def failed(cell: Cell, error: str, start: float, log: str = "") -> Row:
    """The row of a cell that failed; it is run again the next time.

    Args:
        cell: the cell.
        error: what was wrong, in one line.
        start: `time.perf_counter()` at its start.
        log: what it printed; the end of it is kept.
    """
    seconds = time.perf_counter() - start
    kept = log[-LOG_LENGTH:]
    return {"key": cell.key, **asdict(cell), "error": error, "log": kept, "seconds": seconds}


def run_ray(cells: Sequence[Cell], **options: Any) -> Iterator[Row]:
    """Run the cells on a Ray cluster and yield rows as they come.

    Args:
        cells: what to run.
        **options: `address`, `num_cpus` and `num_gpus` of `bara.machine.map_on_ray`.

    Raises:
        BaraError: Ray is missing, or the cluster cannot be reached.
    """
    start = time.perf_counter()
    for cell, row in map_on_ray(_run_here, cells, **options):
        if isinstance(row, Exception):
            yield failed(cell, last_line(row), start)
        else:
            yield row


def _run_here(cell: Cell) -> Row:
    from bara.bench.cell import run_cell
    from bara.bench.worker import describe

    start = time.perf_counter()
    try:
        return run_cell(cell)
    except Exception as error:
        return failed(cell, describe(error), start)
