"""The README.md of a folder: sections between marks, which can be written again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from yaml import YAMLError

from bara.errors import BaraError
from bara.files import atomic_write_text

CARD_FILE = "README.md"
EMPTY_CARD = "---\nlibrary_name: peft\n---\n"
PLAIN_CARD = "---\nlibrary_name: transformers\n---\n"
SECTIONS = ("method", "rank", "metrics")
"""In this order at the top of the card."""
HERE = "path/to/this/folder"
SOURCE = "https://pypi.org/project/bara-peft/"
"""Where results in a card's `model-index` say they are from, if they are ours."""


def table_rows(values: Mapping[str, Any]) -> str:
    """The rows of a table of two columns."""
    return "\n".join(f"| {name} | {value} |" for name, value in values.items())


def write_sections(
    folder: Path,
    sections: Mapping[str, str],
    tags: tuple[str, ...],
    empty: str = EMPTY_CARD,
    results: Sequence[EvalResult] = (),
) -> None:
    """Replaces sections of the card, at its top in the order of `SECTIONS`.

    Args:
        folder: of the card.
        sections: texts by name; an empty one removes the section.
        tags: of the model, besides those that are there.
        empty: what a card starts from.
        results: the metrics once more, for the card's `model-index`; they go with the section
            "metrics". Results that somebody else wrote there stay.
    """
    path = folder / CARD_FILE
    try:
        card = ModelCard(path.read_text("utf-8") if path.is_file() else empty)
    except (OSError, ValueError, TypeError, YAMLError) as error:
        raise BaraError(f"{path} is not a model card: {str(error).splitlines()[0]}") from error
    data: Any = card.data
    if "metrics" in sections:
        others = [r for r in data.eval_results or () if r.source_url != SOURCE]
        data.eval_results = [*others, *results] or None
        name = data.model_name or folder.resolve().name
        data.model_name = name if data.eval_results else None
    if tags:
        data.tags = sorted({*(data.tags or []), *tags})
    text = card.text
    present = {}
    for name in SECTIONS:
        found = re.search(rf"<!-- bara:{name} -->\n(.*?)<!-- /bara:{name} -->\n*", text, re.DOTALL)
        if found:
            present[name] = found[1]
            text = text.replace(found[0], "")
    present |= sections
    blocks = [
        f"<!-- bara:{name} -->\n{present[name]}<!-- /bara:{name} -->\n\n"
        for name in SECTIONS
        if present.get(name)
    ]
    card.text = "".join(blocks) + text.lstrip("\n")
    atomic_write_text(path, str(card))
