"""Corrupted texts at graded strength, for tests under distribution shift."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

RATES = {"typo": 0.1, "drop": 0.1, "shuffle": 0.2}
"""Share of a text's words that each step of severity reaches, by corruption."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def corrupt(texts: Sequence[str], kind: str, severity: int, *, seed: int = 0) -> list[str]:
    """Texts with some of their words corrupted.

    The share of words is `severity` times the kind's rate, in expectation: at severity 5 half of
    the words have a typo or are dropped, and all are shuffled. The words that one severity reaches
    are among those of the next.

    Args:
        texts: words are what white space separates.
        kind: `typo` (one letter left out, doubled, replaced, or swapped with the next), `drop`
            (words left out; one stays) or `shuffle` (the words reached change places).
        severity: 1 to 5.
        seed: each text has its own random numbers, made of the seed, the kind and its position.
    """
    rate = RATES[kind] * severity
    return [
        " ".join(_CORRUPTIONS[kind](text.split(), rate, random.Random(f"{seed} {kind} {position}")))
        for position, text in enumerate(texts)
    ]


def _reached(words: Sequence[str], rate: float, rng: random.Random) -> list[int]:
    # One number a word whatever the rate: what a low rate reaches, a higher one does too.
    return [index for index in range(len(words)) if rng.random() < rate]


def _typos(words: list[str], rate: float, rng: random.Random) -> list[str]:
    reached = set(_reached(words, rate, rng))
    # Every word's typo is drawn, so that it is the same at every severity.
    typos = [_typo(word, rng) for word in words]
    return [typos[i] if i in reached else word for i, word in enumerate(words)]


def _typo(word: str, rng: random.Random) -> str:
    place, edit, letter = rng.randrange(len(word)), rng.randrange(4), rng.choice(LETTERS)
    before, here, after = word[:place], word[place], word[place + 1 :]
    match edit:
        case 0 if len(word) > 1:
            return before + after
        case 1:
            return before + here + here + after
        case 2 if after:
            return before + after[0] + here + after[1:]
    return before + letter + after


def _drop(words: list[str], rate: float, rng: random.Random) -> list[str]:
    dropped = set(_reached(words, rate, rng))
    kept = [word for i, word in enumerate(words) if i not in dropped]
    return kept or words[:1]


def _shuffle(words: list[str], rate: float, rng: random.Random) -> list[str]:
    reached = _reached(words, rate, rng)
    places = reached.copy()
    rng.shuffle(places)
    shuffled = words.copy()
    for source, target in zip(reached, places, strict=True):
        shuffled[target] = words[source]
    return shuffled


_CORRUPTIONS: dict[str, Callable[[list[str], float, random.Random], list[str]]] = {
    "typo": _typos,
    "drop": _drop,
    "shuffle": _shuffle,
}
