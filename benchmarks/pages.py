"""What scripts write into pages that people write too."""

from __future__ import annotations

from pathlib import Path

from bara.errors import BaraError
from bara.files import atomic_write_text


def write_between(page: Path, name: str, text: str) -> None:
    """Puts a text between the marks `<!-- name -->` and `<!-- /name -->` of a page.

    Raises:
        BaraError: the page does not have both.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.read_text("utf-8").partition(first)
    _, closed, after = rest.partition(last)
    if not (found and closed):
        raise BaraError(f"{page} has no {first} with a {last} after it; put both where it belongs")
    atomic_write_text(page, f"{before}{first}\n{text}\n{last}{after}")
