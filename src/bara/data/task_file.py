"""What a task is, kept as JSON in the adapter's folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from bara.errors import BaraError
from bara.schema import read_json

MEND = "it does not describe a task as `bara train` writes it; restore the file"


class TaskFile:
    """The files of a task, which is a dataclass."""

    def save(self, path: Path) -> None:
        """Write the description as JSON."""
        described: Any = self
        text = json.dumps(asdict(described), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            BaraError: the file is missing or does not describe a task; the message names the field.
        """
        task: Self = read_json(path, cls, MEND)
        if (wrong := task.wrong()) is not None:
            raise BaraError(f"{path}: {wrong}; {MEND}")
        return task

    def wrong(self) -> str | None:
        """What the types of the fields do not say is wrong with them."""
        return None
