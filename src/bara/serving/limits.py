"""How much one request, and all that wait, may take."""

from __future__ import annotations

from dataclasses import dataclass

from bara.serving.problems import Problem


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        body: bytes of a request.
        texts: texts of a request, or prompts.
        tokens: new tokens of an answer, or tokens of a prompt that is scored.
        draws: posterior draws.
        queue: requests that wait; each prompt of a request counts.
        rows: texts times draws in one pass of a model, or prompts times draws.
        seconds: from the arrival of a request to its answer.
        adapters: that clients have loaded.
    """

    body: int = 2**20
    texts: int = 64
    tokens: int = 1024
    draws: int = 64
    queue: int = 128
    rows: int = 256
    seconds: float = 60.0
    adapters: int = 64

    def require(self, name: str, value: int, most: int) -> None:
        """Raises Problem 400 if a number of a request is above its bound."""
        if value > most:
            raise Problem(400, f"{name}: at most {most} here, not {value}", param=name)
