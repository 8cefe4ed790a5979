"""The tables in docs/results are those of the committed results; the pages before are short."""

from pathlib import Path

import pytest

from bara.bench.page import update_pages
from bara.bench.run import finished
from bara.bench.spec import Benchmark
from bara.bench.summary import tables

ROOT = Path(__file__).parent.parent
KINDS = {"suite": "benchmarks.md", "development": "defaults.md"}
MOST_LINES = 80
SMALL = {"suite": ["arc-easy", "digits"], "development": ["bara-100-texts", "balora-40-epochs"]}
"""Benchmarks of few rows; the others are made by the same lines."""
DATA = ROOT.parent / "shared/data"
"""What the benchmarks run on; a result is known by what its data were."""


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data of the benchmarks")
@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_the_results(kind, tmp_path, monkeypatch):
    committed = ROOT / "docs" / "results" / kind
    results = ROOT / "benchmarks" / "results" / kind
    monkeypatch.chdir(tmp_path)
    shown = {}
    for name in SMALL[kind]:
        rows = finished(Benchmark.load(ROOT / "benchmarks" / kind / f"{name}.yaml"), results)
        shown[name] = tables(rows, name)
    # as deep as docs/results/KIND, so that links to pictures are the same
    place = tmp_path / "docs" / "results" / kind
    pictures = tmp_path / "benchmarks" / "results" / kind
    for folder in (place, pictures):
        folder.mkdir(parents=True)
    for picture in results.glob("*.png"):
        (pictures / picture.name).touch()
    for name in shown:
        head, mark, _ = (committed / f"{name}.md").read_text("utf-8").partition("<!-- bench")
        end = f"<!-- /bench {name} -->\n"
        (place / f"{name}.md").write_text(f"{head}{mark} {name} -->\n{end}", "utf-8")
    update_pages(place, shown, pictures)
    for name in shown:
        assert (place / f"{name}.md").read_text("utf-8") == (committed / f"{name}.md").read_text(
            "utf-8"
        ), f"docs/results/{kind}/{name}.md is not of the committed results"


@pytest.mark.parametrize(("kind", "page"), KINDS.items())
def test_the_reading_comes_first(kind, page):
    """A page that is read is short, and every page of tables is linked from it."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    behind = {path.stem for path in (ROOT / "docs" / "results" / kind).glob("*.md")}
    planned = (ROOT / "benchmarks" / kind).glob("*.yaml")
    results = ROOT / "benchmarks" / "results" / kind
    run = {path.stem for path in planned if finished(Benchmark.load(path), results)}
    assert len(run) > 3 or not DATA.is_dir()
    assert run <= behind
    for name in behind:
        assert f"](results/{kind}/{name}.md)" in text
