"""Texts at which an answer ends."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Passes a text on, piece by piece, up to the first of some stops, which is not shown.

    What may be the beginning of a stop is held back until it is known.

    Attributes:
        stopped: a stop has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """What can be shown once this piece has come."""
        text = self.held + piece
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        held = max((self._beginning(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, when the text has ended without a stop."""
        rest, self.held = self.held, ""
        return rest

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """Characters at the end of the text that a stop begins with."""
        most = min(len(stop) - 1, len(text))
        return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
