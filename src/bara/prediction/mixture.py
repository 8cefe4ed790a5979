"""One predictive distribution with the draws of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bara.prediction.multi_label import MultiLabelPredictive
from bara.prediction.predictive import ClassificationPredictive, Predictive, RegressionPredictive
from bara.prediction.spans import SpanPredictive, Window
from bara.prediction.words import TokenPredictive


def mixture(parts: Sequence[Any]) -> Predictive:
    """The draws of all, without labels.

    Args:
        parts: predictions of one kind for the same inputs.
    """
    first = parts[0]
    if isinstance(first, ClassificationPredictive):
        return ClassificationPredictive(torch.cat([part.log_probs_draws for part in parts]))
    if isinstance(first, MultiLabelPredictive):
        return MultiLabelPredictive(torch.cat([part.logits_draws for part in parts]))
    if isinstance(first, TokenPredictive):
        words = torch.cat([part.words.log_probs_draws for part in parts])
        return TokenPredictive(ClassificationPredictive(words), first.lengths)
    if isinstance(first, SpanPredictive):
        windows = [
            tuple(_together(same) for same in zip(*of_question, strict=True))
            for of_question in zip(*(part.windows for part in parts), strict=True)
        ]
        passages, length = first.passages, first.max_answer_length
        return SpanPredictive(tuple(windows), passages, first.unanswerable, length)
    means, variances = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("mean_draws", "variance_draws")
    )
    return RegressionPredictive(means, variances)


def _together(windows: Sequence[Window]) -> Window:
    logits = torch.cat([window.logits for window in windows])
    return Window(windows[0].first, logits, torch.cat([window.no_answer for window in windows]))
