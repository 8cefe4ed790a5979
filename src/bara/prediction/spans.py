"""The predictive distribution of extractive question answering: spans of a context."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bara.data.questions import Passage, QuestionWindows
from bara.draws.blocks import log_mean_exp
from bara.errors import BaraError
from bara.prediction.predictive import Predictive, with_labels

CANDIDATES = 5
"""Spans that a record lists."""


class Window(NamedTuple):
    """A model's scores for a part of a context.

    Attributes:
        first: number of its first token in the context.
        logits: (S, m, 2) of its m tokens, to be an answer's first and last.
        no_answer: (S,) score that there is none.
    """

    first: int
    logits: Tensor
    no_answer: Tensor


class SpanDistribution(NamedTuple):
    """The distribution over the spans of one context.

    Attributes:
        log_probs_draws: (S, T, M) log-probability of the answer to begin at each of T tokens and
            to have 1 … M; -inf for what is in no window.
        no_answer_draws: (S,) log-probability that there is none; -inf where there always is one.
    """

    log_probs_draws: Tensor
    no_answer_draws: Tensor

    @classmethod
    def of(cls, windows: Sequence[Window], unanswerable: bool) -> SpanDistribution:
        """The softmax, under each draw, over all spans in a window and, if asked for, no answer.

        A span's score is the sum of the logits of its first and its last token, in the window
        where that is the highest; that of no answer is from the window where it is the lowest.
        """
        length = max(window.first + window.logits.shape[1] for window in windows)
        longest = max(window.logits.shape[1] for window in windows)
        draws = windows[0].logits.shape[0]
        scores = torch.full((draws, length, longest), -torch.inf, dtype=torch.float64)
        for window in windows:
            m = window.logits.shape[1]
            last = torch.arange(m).unsqueeze(1) + torch.arange(m)  # of a start and a length
            start, end = window.logits.double().unbind(-1)
            score = start.unsqueeze(2) + end[:, last.clamp(max=m - 1)]
            score = score.masked_fill(last >= m, -torch.inf)
            part = scores[:, window.first : window.first + m, :m]
            part.copy_(torch.maximum(part, score))
        none = torch.stack([window.no_answer for window in windows]).amin(0).double()
        none = none if unanswerable else torch.full_like(none, -torch.inf)
        every = torch.cat([scores.flatten(1), none.unsqueeze(1)], dim=1).log_softmax(-1)
        return cls(every[:, :-1].view_as(scores), every[:, -1])

    @property
    def log_probs(self) -> Tensor:
        """(T, M) of the mixture over draws."""
        return log_mean_exp(self.log_probs_draws)

    @property
    def no_answer(self) -> Tensor:
        """Log-probability under the mixture that there is no answer, a scalar."""
        return log_mean_exp(self.no_answer_draws)

    def entropies(self) -> tuple[float, float]:
        """Entropy of the mixture, and mean entropy over the draws, in nats."""
        every = torch.cat([self.log_probs_draws.flatten(1), self.no_answer_draws[:, None]], dim=1)
        total = torch.special.entr(log_mean_exp(every).exp()).sum()
        return float(total), float(torch.special.entr(every.exp()).sum(-1).mean())


class Answer(NamedTuple):
    """One question's most probable spans and uncertainties: what `SpanPredictive` is about.

    Attributes:
        spans: first and last token of the most probable answers, the best one first; None for
            "no answer".
        log_probs: of these.
        total, aleatoric: entropies in nats.
        reference: log-probability of a right span; None if none is known.
    """

    spans: tuple[tuple[int, int] | None, ...]
    log_probs: tuple[float, ...]
    total: float
    aleatoric: float
    reference: float | None


@dataclass(frozen=True, eq=False)
class SpanPredictive(Predictive):
    """Answers to n questions as spans of their contexts, under S posterior draws.

    Under a draw the spans of a context are a distribution (`SpanDistribution`); the draws' mixture
    is what predicts. Uncertainties are in nats and of the span: total = aleatoric + epistemic.

    Attributes:
        windows: the scores, for each question by window.
        passages: contexts and references.
        unanswerable: whether "no answer" is one of the answers.
        max_answer_length: most tokens of a predicted answer; longer spans keep their probability,
            and are not chosen.

    Raises:
        BaraError: a question without a window, or a max_answer_length below 1.
    """

    windows: tuple[tuple[Window, ...], ...]
    passages: tuple[Passage, ...]
    unanswerable: bool = False
    max_answer_length: int = 30

    def __post_init__(self) -> None:
        if len(self.windows) != len(self.passages) or not all(self.windows):
            raise BaraError("every question needs a passage and at least one window")
        if self.max_answer_length < 1:
            raise BaraError(f"max_answer_length must be at least 1, not {self.max_answer_length}")

    @property
    def num_draws(self) -> int:
        """S."""
        return self.windows[0][0].logits.shape[0]

    @property
    def labels(self) -> tuple[tuple[str, ...], ...] | None:
        """The texts of each question's references, none for no answer; None if one is unknown."""
        if any(passage.answers is None for passage in self.passages):
            return None
        return tuple(passage.texts for passage in self.passages)

    def distribution(self, question: int) -> SpanDistribution:
        """The distribution over the spans of one question's context."""
        return SpanDistribution.of(self.windows[question], self.unanswerable)

    @cached_property
    def answers(self) -> tuple[Answer, ...]:
        """What is known of each question; computed once, one context's spans at a time."""
        return tuple(self._answer(i) for i in range(len(self.passages)))

    def _answer(self, question: int) -> Answer:
        spans = self.distribution(question)
        log_probs = spans.log_probs
        length = log_probs.shape[1]
        allowed = log_probs[:, : self.max_answer_length].reshape(-1)
        width = min(length, self.max_answer_length)
        best = allowed.topk(min(CANDIDATES, len(allowed)))
        found: list[tuple[float, tuple[int, int] | None]] = [
            (log_prob, (place // width, place // width + place % width))
            for log_prob, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if log_prob > -math.inf
        ]
        if self.unanswerable:
            found.append((float(spans.no_answer), None))
            found = sorted(found, key=lambda pair: -pair[0])[:CANDIDATES]
        reference, right = None, self.passages[question].answers
        if right:
            held = [log_probs[a, b - a] for a, b in right if b - a < length]  # by some window
            reference = float(torch.stack(held).logsumexp(0)) if held else -math.inf
        elif right is not None:
            reference = float(spans.no_answer)
        total, aleatoric = spans.entropies()
        return Answer(
            tuple(span for _, span in found),
            tuple(log_prob for log_prob, _ in found),
            total,
            aleatoric,
            reference,
        )

    @property
    def prediction(self) -> list[str]:
        """The most probable answer of each question; "" for no answer."""
        return [self._text(i, answer.spans[0]) for i, answer in enumerate(self.answers)]

    @property
    def confidence(self) -> Tensor:
        """(n,) probability of the predicted span."""
        return torch.tensor([answer.log_probs[0] for answer in self.answers]).exp().clamp(max=1)

    @property
    def label_log_prob(self) -> Tensor:
        """(n,) log-probability under the mixture that the answer is one of the references.

        Raises:
            BaraError: a question has none.
        """
        found = [answer.reference for answer in self.answers]
        if None in found:
            raise BaraError("metrics need labels: a question has no answers to compare with")
        return torch.tensor(found, dtype=torch.float64)

    @property
    def total_uncertainty(self) -> Tensor:
        """(n,) entropy of the span under the mixture."""
        return torch.tensor([answer.total for answer in self.answers])

    @property
    def aleatoric_uncertainty(self) -> Tensor:
        """(n,) mean over draws of the span's entropy."""
        return torch.tensor([answer.aleatoric for answer in self.answers])

    @property
    def epistemic_uncertainty(self) -> Tensor:
        """(n,) mutual information between the span and the draw; never negative."""
        return (self.total_uncertainty - self.aleatoric_uncertainty).clamp(min=0)

    def select(self, index: Tensor | slice | Sequence[int]) -> SpanPredictive:
        """The questions at ``index``: a slice, positions, or a (n,) boolean mask."""
        chosen = torch.arange(len(self.passages))[index].tolist()
        return SpanPredictive(
            tuple(self.windows[i] for i in chosen),
            tuple(self.passages[i] for i in chosen),
            self.unanswerable,
            self.max_answer_length,
        )

    def to_records(self) -> list[dict[str, Any]]:
        """One dict of plain Python values per question, for JSON.

        Returns:
            ``{"prediction": text, "start": …, "end": …, "confidence": p, "total": …,
            "aleatoric": …, "epistemic": …, "answers": [{"text": …, "start": …, "end": …,
            "probability": p}]}``: characters of the context (None for no answer, whose text is
            ""), nats, and the most probable spans.
        """
        records = []
        for number, answer in enumerate(self.answers):
            every = [
                {**self._place(number, span), "probability": min(1.0, math.exp(log_prob))}
                for span, log_prob in zip(answer.spans, answer.log_probs, strict=True)
            ]
            best = every[0]
            records.append(
                {
                    "prediction": best["text"],
                    "start": best["start"],
                    "end": best["end"],
                    "confidence": best["probability"],
                    "total": answer.total,
                    "aleatoric": answer.aleatoric,
                    "epistemic": max(0.0, answer.total - answer.aleatoric),
                    "answers": every,
                }
            )
        return records

    def _place(self, question: int, span: tuple[int, int] | None) -> dict[str, Any]:
        offsets = self.passages[question].offsets
        start, end = (None, None) if span is None else (offsets[span[0]][0], offsets[span[1]][1])
        return {"text": self._text(question, span), "start": start, "end": end}

    def _text(self, question: int, span: tuple[int, int] | None) -> str:
        return "" if span is None else self.passages[question].text(span)

    def _rows(self) -> list[dict[str, Any]]:
        rows: Iterator[dict[str, Any]] = iter(self.to_records())
        plain = [{k: v for k, v in row.items() if k != "answers"} for row in rows]
        return plain if self.labels is None else with_labels(plain, self.labels)


def start_and_end(output: Any) -> Tensor:
    """The logits of a model for question answering, (rows, T, 2).

    Raises:
        BaraError: it is another model.
    """
    both: list[Any] = [
        output.get(name) if hasattr(output, "get") else None
        for name in ("start_logits", "end_logits")
    ]
    if not all(isinstance(logits, Tensor) and logits.dim() == 2 for logits in both):
        raise BaraError(
            "windows of questions need a model whose output has start_logits and end_logits of "
            "shape (inputs, tokens): a model for extractive question answering"
        )
    return torch.stack(both, dim=-1)


class SpanCollector:
    """Gathers the scores of batches of windows.

    Args:
        data: the windows.
        temperature: divides the logits.
    """

    def __init__(self, data: QuestionWindows, temperature: float = 1.0) -> None:
        self.data = data
        self.temperature = temperature
        self._windows: list[list[Window]] = [[] for _ in data.passages]

    def add(self, logits: Tensor, batch: dict[str, Any]) -> None:
        """Takes a batch's logits (S, n, T, 2)."""
        scaled = logits / self.temperature
        for row, (question, begins, first, length, no_answer) in enumerate(batch["place"].tolist()):
            inside = scaled[:, row, begins : begins + length].clone()
            none = scaled[:, row, no_answer].sum(-1)
            self._windows[question].append(Window(first, inside, none))

    def predictive(self) -> SpanPredictive:
        """All that was taken, in the order of the questions."""
        return SpanPredictive(
            tuple(tuple(windows) for windows in self._windows),
            tuple(self.data.passages),
            self.data.unanswerable,
            self.data.max_answer_length,
        )
