"""The page docs/serving-results.md, from what the benchmarks of `bara serve` have written."""

from __future__ import annotations

from pathlib import Path


def write_page() -> None:
    """Writes it."""
    del Path
