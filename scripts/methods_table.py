"""Writes the table of methods in docs/peers.md from the registrations.

python scripts/methods_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

from bara.methods.table import METHODS, TASKS, Method

PAGE = Path(__file__).parents[1] / "docs" / "peers.md"
BEGIN, END = "<!-- methods -->\n", "<!-- /methods -->\n"


def table() -> str:
    """The rows of all methods, LoRA first and then by name."""
    rows = ["| name | what it is | paper | random between draws | needs |", "|---|---|---|---|---|"]
    names = sorted(METHODS, key=lambda name: (name not in ("lora", "full"), name))
    rows += [f"| `{name}` | {_cells(METHODS[name])} |" for name in names]
    return "\n".join(rows) + "\n"


def _cells(method: Method) -> str:
    needs = [f"`bara-peft[{method.package}]`"] if method.package else []
    needs += [", ".join(method.tasks)] if method.tasks != TASKS else []
    return " | ".join([method.summary, _link(method.paper), method.random, "; ".join(needs)])


def _link(paper: str) -> str:
    if paper.startswith("arXiv "):
        number = paper.removeprefix("arXiv ")
        return f"[{number}](https://arxiv.org/abs/{number})"
    return f"[here]({paper.removeprefix('docs/')})" if paper.startswith("docs/") else paper


def page(text: str) -> str:
    """The page with its table written anew."""
    return re.sub(f"{BEGIN}.*?{END}", f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
