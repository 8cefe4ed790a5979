"""`bara bench`: methods compared on the same work, from a file that can be run again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from bara.cli.options import Executor, Gpus, RayAddress, refuse_without_ray
from bara.cli.terminal import console, say_next, say_without_dry_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bara.bench.results import Row
    from bara.bench.spec import Cell
    from bara.bench.summary import Table


def bench(
    context: Context,
    files: Annotated[list[Path], Argument(help="Benchmarks (YAML).")],
    output: Annotated[Path, Option(help="Folder for the results.")] = Path("bara-bench"),
    workers: Annotated[
        int | None, Option(min=1, max=1024, help="Cells at a time; as many as there are cores.")
    ] = None,
    threads: Annotated[int, Option(min=1, max=1024, help="CPU threads of each cell.")] = 1,
    executor: Annotated[Executor, Option(help="This machine, or a Ray cluster.")] = Executor.local,
    ray_address: RayAddress = None,
    gpus: Gpus = None,
    baseline: Annotated[str, Option(help="Method that others are compared to.")] = "lora",
    page: Annotated[
        Path | None,
        Option(help="Markdown page, or folder of them, to put the tables into."),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List the cells that are missing.")] = False,
    report_only: Annotated[
        bool, Option("--report-only", help="Run nothing; write the report of what is there.")
    ] = False,
) -> None:
    """Run what is missing of some benchmarks, and write tables, pictures and a report."""
    from bara.bench.executors import run_local, run_ray
    from bara.bench.page import REPORT_FILE, update_pages, write_outputs
    from bara.bench.run import finished, only_writer, pending, run_cells
    from bara.bench.spec import Benchmark
    from bara.bench.summary import overview
    from bara.errors import BaraError
    from bara.machine import quieten_libraries

    refuse_without_ray(executor, {"--ray-address": ray_address, "--gpus": gpus})
    quieten_libraries()
    benchmarks = [Benchmark.load(file) for file in files]
    names = [benchmark.name for benchmark in benchmarks]
    for benchmark in benchmarks:
        if names.count(benchmark.name) > 1:
            raise BaraError(f"two benchmarks are named {benchmark.name!r}; give one another `name`")
        benchmark.check()
    if dry_run:
        missing = pending(benchmarks, output)
        for cell in missing:
            print(f"{cell.key}  {cell}")
        say_without_dry_run(context, *([] if missing or report_only else ["--report-only"]))
        return

    def execute(cells: Sequence[Cell]) -> Iterable[Row]:
        if executor is Executor.ray:
            return run_ray(cells, address=ray_address, num_cpus=threads, num_gpus=gpus)
        return run_local(cells, workers=workers or min(_cores(), len(cells)), threads=threads)

    cells, failures = [], []
    if not report_only:
        with only_writer(output):
            if cells := pending(benchmarks, output):
                rows = run_cells(cells, output, execute)
                failures = _follow(rows, len(cells))
    shown = write_outputs(benchmarks, output, baseline=baseline)
    if page is not None:
        update_pages(page, shown, output)
    _print_tables([overview(finished(b, output), b.name) for b in benchmarks if b.name in shown])
    console().print(f"{output / REPORT_FILE} shows the pictures.", soft_wrap=True)
    if failures:
        raise BaraError(
            f"{len(failures)} of {len(cells)} cells failed; the same command tries them again "
            f"(first: {failures[0]['name']} on {failures[0]['task']}: {failures[0]['error']})"
        )
    say_next(["bara", "train", "--model", "MODEL", "--data", "TABLE", "--method", "METHOD"])


def _follow(rows: Iterable[Row], total: int) -> list[Row]:
    """Show every row as it comes, and a bar on a terminal; returns the cells that failed."""
    from tqdm.auto import tqdm

    failures = []
    with tqdm(rows, "cells", total, disable=None) as bar:
        for row in bar:
            if "error" in row:
                failures.append(row)
            bar.write(_line(row), file=sys.stderr)
    return failures


def _line(row: Row) -> str:
    what = f"{row['name']} on {row['task']}, seed {row['seed']} ({row['seconds']:.0f} s)"
    if "error" in row:
        return f"{what}: FAILED: {row['error']}"
    shown = ("accuracy", "rmse", "nll", "ece", "spearman", "s_bar")
    return f"{what}: " + ", ".join(f"{name} {row[name]:.3f}" for name in shown if row.get(name))


def _print_tables(tables: list[Table]) -> None:
    from rich.table import Table as View

    terminal = console()
    for table in tables:
        view = View(title=table.title, padding=(0, 0, 0, 1), title_justify="left")
        for i, heading in enumerate(table.headings):
            number = i > table.headings.index("method")
            view.add_column(heading, justify="right" if number else "left", no_wrap=not number)
        for row in table.rows:
            view.add_row(*row)
        terminal.print(view)


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
