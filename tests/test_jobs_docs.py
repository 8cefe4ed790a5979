"""The Python of docs/conformal.md and docs/labelling.md, and the example, run as they stand."""

import re
import runpy
from pathlib import Path

import pytest
from datasets import disable_progress_bars

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["conformal.md", "labelling.md"])
def test_the_page_s_python_runs(page, capsys):
    text = (ROOT / "docs" / page).read_text("utf-8")
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    assert capsys.readouterr().out.count("tensor") >= 1


def test_the_active_learning_example_runs(tiny_model_dir, capsys):
    disable_progress_bars()
    main = runpy.run_path(str(ROOT / "examples" / "active_learning.py"))["main"]
    main(tiny_model_dir, num_pool=40, num_test=20, k=8, rounds=2, epochs=8)
    printed = capsys.readouterr().out
    assert re.findall(r"(\d+) labels: accuracy 0\.", printed) == ["8", "16"]
