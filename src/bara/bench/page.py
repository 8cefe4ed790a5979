"""What a benchmark leaves to read: results as CSV, pictures, an HTML report, a Markdown page."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from bara.bench.figures import figures
from bara.bench.results import Row, write_csv
from bara.bench.run import finished
from bara.bench.spec import Benchmark
from bara.bench.summary import Table, tables
from bara.errors import BaraError
from bara.files import atomic_write_text
from bara.reports.report import render_page
from bara.reports.style import DARK, save_figure, to_png

CSV_FILE = "results.csv"
REPORT_FILE = "report.html"


def write_outputs(
    benchmarks: Sequence[Benchmark], folder: Path, *, baseline: str = "lora"
) -> dict[str, list[Table]]:
    """Write the tidy table, the pictures and the report of all finished cells.

    Returns:
        The tables of each benchmark that has finished cells, by its name.

    Raises:
        BaraError: a file cannot be written.
    """
    rows = {benchmark.name: finished(benchmark, folder) for benchmark in benchmarks}
    rows = {name: found for name, found in rows.items() if found}
    write_csv(folder / CSV_FILE, [row for found in rows.values() for row in found])
    shown = {name: tables(found, name, baseline) for name, found in rows.items()}
    for name, found in rows.items():
        for figure_name, figure in figures(found, baseline).items():
            save_figure(figure, folder / f"{name}-{figure_name}.png")
    _write_report(folder / REPORT_FILE, rows, shown, baseline)
    return shown


def _write_report(
    path: Path, rows: dict[str, list[Row]], shown: dict[str, list[Table]], baseline: str
) -> None:
    sections = []
    for name, found in rows.items():
        dark = figures(found, baseline, DARK)
        pictures = {
            picture: {"light": _data_uri(figure), "dark": _data_uri(dark[picture])}
            for picture, figure in figures(found, baseline).items()
        }
        sections.append({"name": name, "tables": shown[name], "pictures": pictures})
    atomic_write_text(path, render_page("bench.html.j2", sections=sections))


def _data_uri(figure: object) -> str:
    return "data:image/png;base64," + base64.b64encode(to_png(figure, 150)).decode()  # type: ignore[arg-type]


def update_pages(place: Path, shown: dict[str, list[Table]], folder: Path) -> None:
    """Put the tables into one page, or, where `place` is a folder, each benchmark's into NAME.md
    there, which is made if need be.

    Raises:
        BaraError: see `update_page`.
    """
    if not place.is_dir():
        update_page(place, shown, folder)
        return
    for name in shown:
        page = place / f"{name}.md"
        if not page.exists():
            atomic_write_text(page, "\n".join([f"# {name}", "", *_marks(name), ""]))
        update_page(page, shown, folder)


def update_page(page: Path, shown: dict[str, list[Table]], folder: Path) -> None:
    """Put each benchmark's tables and pictures between its marks in a Markdown page.

    The marks are `<!-- bench NAME -->` and `<!-- /bench NAME -->`, each on a line of its own;
    everything outside of them stays. Benchmarks without marks are left out.

    Raises:
        BaraError: the page cannot be read, or has no marks for any of the benchmarks.
    """
    try:
        text = page.read_text("utf-8")
    except OSError as error:
        raise BaraError(f"cannot read the page {page}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BaraError(f"the page {page} is not UTF-8 text; convert it first") from error
    found = False
    for name, of_benchmark in shown.items():
        start, end = _marks(name)
        before, mark, rest = text.partition(start)
        _, closing, after = rest.partition(end)
        if not mark or not closing:
            continue
        found = True
        relative = Path(os.path.relpath(folder, page.parent)).as_posix()
        pictures = [
            f"![{name}, {file.stem.removeprefix(name + '-')}]({relative}/{file.name})"
            for file in _pictures(folder, name, shown)
        ]
        content = "\n\n".join([*(table.to_markdown() for table in of_benchmark), *pictures])
        text = f"{before}{start}\n\n{content}\n\n{end}{after}"
    if not found:
        raise BaraError(
            f"{page} has no marks for {', '.join(shown) or 'any benchmark'}; put a line "
            "<!-- bench NAME --> and a line <!-- /bench NAME --> where the tables should be"
        )
    atomic_write_text(page, text)


def _pictures(folder: Path, name: str, names: Iterable[str]) -> list[Path]:
    """A benchmark's pictures, without those of others whose names begin with its own."""
    others = tuple(f"{other}-" for other in names if other.startswith(f"{name}-"))
    files = sorted(folder.glob(f"{name}-*.png"))
    return [file for file in files if not file.name.startswith(others)]


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- bench {name} -->", f"<!-- /bench {name} -->"
