"""Draws put together, and the distance of two predictions, for labels, words and spans."""

from __future__ import annotations

import pytest
import torch

from bara import ClassificationPredictive, MultiLabelPredictive, SpanPredictive, TokenPredictive
from bara.data.questions import Passage
from bara.evaluation.difference import difference
from bara.prediction.mixture import mixture
from bara.prediction.spans import Window

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randn(5, 4, 3, generator=GENERATOR)
WORDS = (2 * torch.randn(5, 6, 3, generator=GENERATOR)).log_softmax(-1)
SPANS = torch.randn(5, 4, 2, generator=GENERATOR)
PASSAGE = Passage("a b c d", ((0, 1), (2, 3), (4, 5), (6, 7)))


def labels(draws: slice) -> MultiLabelPredictive:
    return MultiLabelPredictive(LABELS[draws])


def words(draws: slice) -> TokenPredictive:
    return TokenPredictive(ClassificationPredictive(WORDS[draws]), torch.tensor([2, 4]))


def spans(draws: slice) -> SpanPredictive:
    part = SPANS[draws]
    windows = (Window(0, part[:, :3], part[:, 0, 0]), Window(1, 2 * part[:, 1:], part[:, 0, 1]))
    return SpanPredictive((windows,), (PASSAGE,), unanswerable=True)


@pytest.mark.parametrize("kind", [labels, words, spans])
def test_the_mixture_of_parts_is_that_of_all_their_draws(kind):
    together = mixture([kind(slice(0, 2)), kind(slice(2, 5))])
    assert together.num_draws == 5
    assert together.to_records() == kind(slice(0, 5)).to_records()


def test_the_distance_of_labels_is_the_mean_over_them():
    first, second = labels(slice(0, 2)), labels(slice(2, 5))
    apart = difference(first, second)
    p, q = (part.logits_draws.sigmoid().mean(0).tolist() for part in (first, second))
    rows = [
        sum(abs(a - b) for a, b in zip(x, y, strict=True)) / 3 for x, y in zip(p, q, strict=True)
    ]
    assert (apart.mean, apart.largest) == pytest.approx((sum(rows) / 4, max(rows)), abs=1e-6)
    changed = [
        any((a > 0.5) != (b > 0.5) for a, b in zip(x, y, strict=True))
        for x, y in zip(p, q, strict=True)
    ]
    assert apart.changed == sum(changed) / 4


def test_the_distance_of_words_is_the_mean_over_an_input_s():
    first, second = words(slice(0, 2)), words(slice(2, 5))
    apart = difference(first, second)
    p, q = (part.words.log_probs_draws.exp().mean(0).tolist() for part in (first, second))
    each = [
        sum(abs(a - b) for a, b in zip(x, y, strict=True)) / 2 for x, y in zip(p, q, strict=True)
    ]
    rows = [sum(each[:2]) / 2, sum(each[2:]) / 4]
    assert apart.num_inputs == 2
    assert (apart.mean, apart.largest) == pytest.approx((sum(rows) / 2, max(rows)), abs=1e-6)


def test_the_distance_of_spans_is_the_total_variation():
    first, second = spans(slice(0, 2)), spans(slice(2, 5))

    def probabilities(part: SpanPredictive) -> torch.Tensor:
        found = part.distribution(0)
        every = torch.cat([found.log_probs_draws.flatten(1), found.no_answer_draws[:, None]], 1)
        probs = every.exp().mean(0)
        assert probs.sum().item() == pytest.approx(1)
        return probs

    expected = 0.5 * (probabilities(first) - probabilities(second)).abs().sum().item()
    assert difference(first, second).mean == pytest.approx(expected, abs=1e-6)
    assert difference(first, first).changed == 0
