"""What scripts write into pages that people write too."""

from __future__ import annotations

from pathlib import Path

from bara.files import atomic_write_text


def write_between(page: Path, name: str, text: str) -> None:
    """Puts a text between the marks `<!-- name -->` and `<!-- /name -->` of a page."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = page.read_text("utf-8").partition(first)
    after = rest.partition(last)[2]
    atomic_write_text(page, f"{before}{first}\n{text}\n{last}{after}")
