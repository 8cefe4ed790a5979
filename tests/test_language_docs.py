"""The Python of docs/language-models.md runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs/language-models.md"


def test_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    printed = capsys.readouterr().out
    assert "Threshold(uncertainty=" in printed
    assert len(names["answers"]) == 2
