"""The predictive distribution of token classification: a class for every word of an input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bara.draws.blocks import log_mean_exp
from bara.errors import BaraError
from bara.prediction.predictive import ClassificationPredictive, Predictive, with_labels

WordPooling = Literal["first", "mean", "tokens"]
IGNORED = -100
"""Label of a word or token that has none."""


@dataclass(frozen=True, eq=False)
class TokenPredictive(Predictive):
    """Class probabilities of the words of n inputs under S posterior draws.

    A word is what the data's `word_ids` count; without them, and with `words="tokens"`, it is a
    token.

    Attributes:
        words: of all W words, input after input; its probabilities are (W, C), its uncertainties
            (W,) in nats. Its labels, if any, are -100 for words without one.
        lengths: (n,) how many words each input has.
        texts: the words themselves, a tuple for each input, or None.

    Raises:
        BaraError: the lengths or the texts do not fit the words.
    """

    words: ClassificationPredictive
    lengths: Tensor
    texts: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        total = self.words.log_probs_draws.shape[1]
        if self.lengths.dim() != 1 or int(self.lengths.sum()) != total:
            raise BaraError(f"the lengths of the inputs must add up to {total} words")
        if self.texts is not None and [len(t) for t in self.texts] != self.lengths.tolist():
            raise BaraError("texts must be one for every word of every input")

    @property
    def num_draws(self) -> int:
        """S."""
        return self.words.num_draws

    @property
    def labels(self) -> Tensor | None:
        """(W,) reference classes of the words, -100 for those without one, or None."""
        return self.words.labels

    @property
    def labelled(self) -> ClassificationPredictive:
        """The words that have a label.

        Raises:
            BaraError: there is none.
        """
        if self.labels is None or not (known := self.labels != IGNORED).any():
            raise BaraError("metrics need labels: no word of the data has one")
        return self.words.select(known)

    @property
    def confidence(self) -> Tensor:
        """(n,) probability that all words of an input are as predicted, under the mixture."""
        draws = self.words.log_probs_draws
        chosen = draws.gather(-1, self.words.prediction.expand(len(draws), -1).unsqueeze(-1))
        sums = draws.new_zeros(len(draws), len(self.lengths))
        sums.index_add_(1, self.owners, chosen.squeeze(-1))
        return log_mean_exp(sums).exp()

    @property
    def owners(self) -> Tensor:
        """(W,) number of the input that each word belongs to."""
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths)

    def split(self) -> list[ClassificationPredictive]:
        """The words of each input."""
        ends = self.lengths.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        return [self.words.select(slice(*part)) for part in zip(starts, ends, strict=True)]

    def select(self, index: Tensor | slice | Sequence[int]) -> TokenPredictive:
        """The inputs at ``index``: a slice, positions, or a (n,) boolean mask."""
        chosen = torch.arange(len(self.lengths))[index].tolist()
        positions = torch.arange(len(self.owners)).split(self.lengths.tolist())
        words = torch.cat([positions[i] for i in chosen] or [torch.arange(0)])
        texts = None if self.texts is None else tuple(self.texts[i] for i in chosen)
        return TokenPredictive(self.words.select(words), self.lengths[index], texts)

    def to_records(self) -> list[dict[str, Any]]:
        """One dict of plain Python values per input, for JSON.

        Returns:
            ``{"prediction": [names], "confidence": p, "words": [{"word": …, "prediction": name,
            "probabilities": {name: p}, "total": …, "aleatoric": …, "epistemic": …}]}``,
            uncertainties in nats; `word` only where the words are known.
        """
        words, records = iter(self._by_word()), []
        for length, confidence in zip(self.lengths.tolist(), self.confidence.tolist(), strict=True):
            mine = [next(words) for _ in range(length)]
            predicted = [word["prediction"] for word in mine]
            records.append({"prediction": predicted, "confidence": confidence, "words": mine})
        return records

    def _by_word(self) -> list[dict[str, Any]]:
        records = self.words.to_records()
        if self.texts is None:
            return records
        texts = [text for words in self.texts for text in words]
        return [{"word": t, **record} for t, record in zip(texts, records, strict=True)]

    def _rows(self) -> list[dict[str, Any]]:
        places = [{"input": i, "position": p} for i, n in enumerate(self.lengths) for p in range(n)]
        rows = [{**place, **w} for place, w in zip(places, self._by_word(), strict=True)]
        if self.labels is None:
            return rows
        return with_labels(rows, [row.get("label") for row in self.words._rows()])


@dataclass
class WordCollector:
    """Gathers the words of batches of token logits.

    Args:
        pooling: of a word's tokens: `first`, the one that training labels, `mean`, the mean of
            their probabilities, or `tokens`, all of them, each as a word of its own.
        temperature: divides a word's logits.
    """

    pooling: WordPooling
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.pooling not in get_args(WordPooling):
            known = ", ".join(map(repr, get_args(WordPooling)))
            raise BaraError(f"words must be one of {known}, not {self.pooling!r}")
        self._log_probs: list[Tensor] = []  # (S, words, C) for each input
        self._labels: list[Tensor] = []
        self._order: list[int] = []

    def add(self, logits: Tensor, batch: dict[str, Any], index: Sequence[int]) -> None:
        """Takes a batch's logits (S, n, T, C).

        Its `word_ids` (n, T) are the number of the word that each token belongs to, -1 for tokens
        of none. Without them words are the tokens with a label, or else all that are no padding.
        """
        ids, labels = batch.get("word_ids"), batch.get("labels")
        if isinstance(ids, Tensor):
            inside = ids.cpu() >= 0
            before = torch.nn.functional.pad(ids.cpu(), (1, 0), value=-1)[:, :-1]
            first = inside if self.pooling == "tokens" else inside & (ids.cpu() != before)
        elif isinstance(labels, Tensor):
            inside = first = labels.cpu() != IGNORED
        else:
            mask = batch.get("attention_mask")
            shape = logits.shape[1:3]
            inside = first = torch.ones(shape).bool() if mask is None else mask.cpu().bool()
        log_probs = logits.log_softmax(-1)
        found = log_probs[:, first]
        if self.pooling == "mean":
            word = first[inside].cumsum(0) - 1
            sums = torch.zeros_like(found).index_add_(1, word, log_probs[:, inside].exp())
            found = (sums / word.bincount().unsqueeze(-1)).log()
        if self.temperature != 1:  # of a word's probabilities, whatever they are made of
            found = (found / self.temperature).log_softmax(-1)
        lengths = first.sum(1).tolist()
        self._log_probs += found.split(lengths, dim=1)
        if isinstance(labels, Tensor):
            self._labels += labels.cpu()[first].split(lengths)
        self._order += index

    def predictive(self, label_names: tuple[str, ...] | None) -> TokenPredictive:
        """All that was taken, in the order of the data."""
        order = torch.tensor(self._order).argsort().tolist()
        words = [self._log_probs[i] for i in order]
        labels = torch.cat([self._labels[i] for i in order]) if self._labels else None
        every = ClassificationPredictive(torch.cat(words, dim=1), labels, label_names)
        return TokenPredictive(every, torch.tensor([w.shape[1] for w in words]))
