"""The Python of the pages on language models, images and reward models runs as it stands."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def run_page(name):
    """Executes a page's blocks as one script; returns its names."""
    page = (DOCS / name).read_text("utf-8")
    names: dict[str, object] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    return names


def test_the_page_runs(capsys):
    names = run_page("language-models.md")
    printed = capsys.readouterr().out
    assert "Threshold(uncertainty=" in printed
    assert len(names["answers"]) == 2


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("sequence-to-sequence.md", "input 2"),
        ("images.md", "8 ['blue', 'red']"),
        ("reward-models.md", "accuracy"),
    ],
)
def test_pages_by_job_run(name, printed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(name)
    assert printed in capsys.readouterr().out
