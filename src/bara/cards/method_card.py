"""The README.md beside an adapter: its method, its rank, how good it is, how to load it.

PEFT writes the file when it saves an adapter. What `bara` adds stands between marks, one pair for
each section, so that a section can be written again and what others wrote stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bara.cards.card_file import HERE, table_rows, write_sections
from bara.cards.loading_code import SavedAdapter, loading_code, task_type

MOST_NAMES = 8
"""More target modules than this are counted, not listed."""

METHOD = """# {title} adapter

A Bayesian low-rank adapter, trained with [bara](https://pypi.org/project/bara-peft/) on
[PEFT](https://github.com/huggingface/peft): {what}.

| | |
|---|---|
{facts}

## How to load it

With `bara`, which gives the posterior and so the uncertainty:

{with_bara}
If `bara train` made it, `bara predict FOLDER --data TABLE` does all this, and
`model, tokenizer, task = bara.load_adapter(FOLDER)` also builds the base model and the
tokeniser.

Without `bara`: `bara export FOLDER --mode mean --data TABLE --output plain-lora` writes the
posterior mean as a plain LoRA adapter, once, and from then on PEFT alone loads it:

{without_bara}"""


def write_method_card(
    folder: str | Path, config: Any, *, title: str, what: str, num_observations: int | None
) -> None:
    """Writes what the configuration tells; earlier measurements are removed.

    Args:
        folder: of the adapter.
        config: its `LoraConfig`.
        title: of the method.
        what: the method is, in a line.
        num_observations: N.
    """
    saved = SavedAdapter.read(Path(folder))
    facts = {
        "base model": config.base_model_name_or_path,
        "method": title,
        "r": _factors(config.r, saved.ranks),
        "lora alpha": config.lora_alpha,
        "target modules": _modules(config.target_modules),
        "task type": task_type(config),
        "num observations": num_observations,
    }
    section = METHOD.format(
        title=title,
        what=what,
        facts=table_rows(facts),
        with_bara=loading_code(config, saved, HERE, library="bara"),
        without_bara=loading_code(config, saved, "plain-lora", library="peft"),
    )
    sections = {"method": section, "rank": "", "metrics": ""}
    tag = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    write_sections(Path(folder), sections, tags=("bara", tag))


def _factors(r: int, ranks: tuple[int, ...]) -> str:
    """`r`, or what the layers have where pruning or a pattern made them differ."""
    if len(set(ranks)) < 2:
        return str(ranks[0] if ranks else r)
    return f"{min(ranks)}-{max(ranks)}, {sum(ranks)} factors in {len(ranks)} layers"


def _modules(targets: Iterable[str] | str | None) -> str:
    """The names, or where there are many how often each last part occurs."""
    if targets is None or isinstance(targets, str):
        return str(targets)
    names = sorted(targets)
    if len(names) <= MOST_NAMES:
        return ", ".join(names)
    parts = Counter(name.rpartition(".")[2] for name in names)
    return f"{len(names)}: " + ", ".join(f"{part} ({n})" for part, n in parts.most_common())
