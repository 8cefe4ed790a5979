"""An answer of the mixture over draws, with its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from itertools import combinations
from typing import Any

from torch import Tensor

from bara.language.prompts import (
    Prompt,
)


@dataclass(frozen=True, eq=False)
class Generation:
    """One answer of the mixture over draws, of T tokens. Uncertainties are in nats.

    Attributes:
        prompt: what was asked.
        text: the answer, without special tokens.
        tokens: (T,) token ids, the end-of-text token included where there is one.
        pieces: T strings, the text that each token adds; joined they are `text`, but for a last
            character that is not complete.
        token_log_probs: (T,) log-probability of each token under the mixture.
        total_uncertainty: (T,) entropy of the mixture's next-token distribution.
        aleatoric_uncertainty: (T,) mean over draws of each draw's entropy.
        log_probs: (T, V) the mixture's distributions, with `output_logits=True`, else None.
        answers: each draw's own answer, S texts; empty with `agreement=False`.
    """

    prompt: Prompt
    text: str
    tokens: Tensor
    pieces: tuple[str, ...]
    token_log_probs: Tensor
    total_uncertainty: Tensor
    aleatoric_uncertainty: Tensor
    log_probs: Tensor | None
    answers: tuple[str, ...]

    @property
    def epistemic_uncertainty(self) -> Tensor:
        """(T,) mutual information between the next token and the draw; never negative."""
        return (self.total_uncertainty - self.aleatoric_uncertainty).clamp(min=0)

    @property
    def score(self) -> float:
        """Mean log-probability of the tokens: the length-normalised log-likelihood."""
        return float(self.token_log_probs.mean())

    @property
    def uncertainty(self) -> float:
        """1 - exp(score), in [0, 1]: what `bara.calibrate_threshold` is given."""
        return 1 - math.exp(self.score)

    @cached_property
    def agreement(self) -> float | None:
        """Mean similarity of two draws' answers, in [0, 1]: 1 if all are the same.

        The similarity of two texts is 2 M / L, with M the words in matching blocks and L the
        words of both (`difflib`): the "lexical similarity" of Fomicheva et al. 2020, arXiv
        2005.10608. None without answers.
        """
        if not self.answers:
            return None
        words = [answer.split() for answer in self.answers]
        pairs = [
            1.0 if a == b else SequenceMatcher(None, a, b, autojunk=False).ratio()
            for a, b in combinations(words, 2)
        ]
        return sum(pairs) / len(pairs) if pairs else 1.0

    def to_record(self) -> dict[str, Any]:
        """Plain Python values, for JSON: the text, its scores, and a list of its tokens."""
        columns = (
            self.token_log_probs,
            self.total_uncertainty,
            self.epistemic_uncertainty,
        )
        return {
            "prompt": self.prompt,
            "text": self.text,
            "score": self.score,
            "total": float(self.total_uncertainty.mean()),
            "epistemic": float(self.epistemic_uncertainty.mean()),
            "agreement": self.agreement,
            "answers": list(self.answers),
            "tokens": [
                {"text": piece, "log_prob": log_prob, "total": total, "epistemic": epistemic}
                for piece, log_prob, total, epistemic in zip(
                    self.pieces, *(column.tolist() for column in columns), strict=True
                )
            ],
        }
