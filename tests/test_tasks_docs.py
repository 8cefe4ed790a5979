"""The Python of docs/tasks.md runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs/tasks.md"


def test_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    printed = capsys.readouterr().out
    for metric in ("subset_accuracy", "precision", "exact_match"):
        assert metric in printed
    assert len(names["windows"]) > 1
    assert names["predictive"].num_draws == 10
    assert names["tokens"].lengths.tolist() == [6, 3]  # avienna is two tokens
