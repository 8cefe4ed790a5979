"""Predictions and ranks of texts, requests together."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bara.evaluation.abstention import Threshold
from bara.evaluation.conformal import Conformal
from bara.prediction.predict import predict
from bara.prediction.words import TokenPredictive
from bara.ranks.effective_rank import effective_rank
from bara.serving.batcher import Job
from bara.serving.inputs import encode, given, owners
from bara.serving.limits import Limits
from bara.serving.metrics import Metrics
from bara.serving.problems import Problem
from bara.serving.schemas import READS, PredictRequest, RankRequest
from bara.serving.served import Served


@dataclass(frozen=True)
class Prediction:
    """A request for predictions with what its answer takes.

    Attributes:
        request: as it came.
        inputs: to predict for, as of `given`.
        threshold: above which it wants to abstain.
        conformal: calibration of the sets or intervals that it wants.
    """

    request: PredictRequest
    inputs: list[list[str]]
    threshold: Threshold | None
    conformal: Conformal | None


class Predictor:
    """Predicts with one adapter, texts of several requests in one call of `bara.predict`.

    Requests share a pass if they want the same draws: number and seed.

    Args:
        served: the adapter.
        limits: of the server.
        metrics: is told of every prediction.
    """

    def __init__(self, served: Served, limits: Limits, metrics: Metrics) -> None:
        self.served = served
        self.limits = limits
        self.metrics = metrics

    def job(self, request: PredictRequest) -> Job:
        """The work of a request.

        Raises:
            Problem: 400: the texts do not fit the task, or are too many; this is a language model;
                or nothing was calibrated under the request's options.
        """
        inputs = given(self.served, request, self.limits)
        self.limits.require("num_draws", request.num_draws, self.limits.draws)
        asked = Prediction(request, inputs, self._threshold(request), self._conformal(request))
        settings = (request.num_draws, request.seed, request.deterministic)
        draws = 1 if request.deterministic else request.num_draws
        return Job(self.run, settings, len(inputs) * draws, asked, self._deadline())

    def run(self, jobs: Sequence[Job]) -> None:
        """Predicts the texts of all jobs, and gives each its answer."""
        num_draws, seed, deterministic = jobs[0].settings
        inputs = [one for job in jobs for one in job.payload.inputs]
        data = encode(self.served, inputs)
        self._require_short(data, 1 if deterministic else num_draws)
        predictive: Any = predict(
            self.served.model,
            data,
            num_draws=num_draws,
            seed=seed,
            deterministic=deterministic,
            batch_size=self.limits.rows,
            progress=False,
        )
        if isinstance(predictive, TokenPredictive):
            predictive = replace(predictive, texts=tuple(map(tuple, inputs)))
        start = 0
        for job in jobs:
            end = start + len(job.payload.inputs)
            job.finish(self._answer(job.payload, predictive.select(slice(start, end))))
            start = end

    def _require_short(self, data: Any, draws: int) -> None:
        """Refuses contexts so long that the table of their spans would fill the memory."""
        most = max(1, self.limits.rows // draws)
        for question, count in Counter(owners(data)).items():
            if count > most:
                message = (
                    f"questions.{question}: its context makes {count} windows, and with {draws} "
                    f"draws at most {most} are taken: shorten it, or ask for fewer draws"
                )
                raise Problem(400, message, param="questions")

    def _threshold(self, request: PredictRequest) -> Threshold | None:
        """The threshold that a request wants to abstain with; None if it does not."""
        if request.abstain_at_risk is None:
            return None
        if self.served.task.task == "regression":
            raise Problem(400, "abstain_at_risk is not for regression", param="abstain_at_risk")
        return self.served.threshold(
            request.abstain_at_risk,
            measure="predictions",
            **self._conditions(request, "abstain_at_risk"),
        )

    def _conformal(self, request: PredictRequest) -> Conformal | None:
        """The calibration of the sets or intervals that a request wants; None if it does not."""
        if request.coverage is None:
            return None
        if self.served.task.task not in ("classification", "regression"):
            raise Problem(400, "coverage is for classification and regression", param="coverage")
        return self.served.conformal(request.coverage, **self._conditions(request, "coverage"))

    @staticmethod
    def _conditions(request: PredictRequest, name: str) -> dict[str, Any]:
        """What a calibration must have been made under to serve a request."""
        if request.deterministic:
            raise Problem(400, f"{name} needs draws", param="deterministic")
        return {"num_draws": request.num_draws, "seed": request.seed}

    def _answer(self, asked: Prediction, predictive: Any) -> dict[str, Any]:
        """What a request is answered: with a threshold, what is too uncertain has no prediction."""
        served, request = self.served, asked.request
        records = predictive.to_records()
        if asked.threshold is not None:
            asked.threshold.take_back(records, 1 - predictive.confidence)
        if asked.conformal is not None and request.coverage is not None:
            sets = asked.conformal.to_records(predictive, request.coverage)
            for record, more in zip(records, sets, strict=True):
                record |= more
        for record in records:
            self.metrics.told_answer(
                served.name, _epistemic(record), record.get("abstained", False)
            )
        return {
            "object": "predictions",
            "model": served.name,
            "task": served.task.task,
            "num_draws": predictive.num_draws,
            "seed": request.seed,
            "predictions": records,
        }

    # -- ranks ---------------------------------------------------------------------------------

    def rank_job(self, request: RankRequest) -> Job:
        """The work of a request for ranks.

        Raises:
            Problem: 400: the texts do not fit, or the adapter has no Bayesian layers.
        """
        if not self.served.has_rank:
            raise Problem(400, f"{self.served.name} has no rank that could be told", param="model")
        texts: Any
        if self.served.generates:
            texts = [request.messages] if request.messages else request.texts
            if not texts or any(getattr(request, other) for other in READS if other != "texts"):
                raise Problem(400, "give texts or messages", param="texts")
            self.limits.require("texts", len(texts), self.limits.texts)
        elif request.messages:
            raise Problem(400, f"{self.served.name} reads texts", param="messages")
        else:
            texts = given(self.served, request, self.limits)
        return Job(self.run_ranks, (), len(texts), texts, self._deadline())

    def run_ranks(self, jobs: Sequence[Job]) -> None:
        """The rank of every layer for the texts of each job: the layer's name, r, mean in use."""
        data = encode(self.served, [text for job in jobs for text in job.payload])
        found = effective_rank(self.served.model, data, batch_size=self.limits.rows, progress=False)
        owner, start = torch.tensor(owners(data)), 0
        for job in jobs:
            end = start + len(job.payload)
            mine = (owner >= start) & (owner < end)
            means = found.soft[:, mine].mean(1).tolist()
            job.finish(list(zip(found.layers, found.max_rank, means, strict=True)))
            start = end

    def _deadline(self) -> float:
        return time.monotonic() + self.limits.seconds


def _epistemic(record: dict[str, Any]) -> float:
    """Of a prediction; of several labels or words their mean."""
    if "epistemic" in record:
        return float(record["epistemic"])
    parts = record["words"] if "words" in record else record["labels"].values()
    return sum(part["epistemic"] for part in parts) / len(parts)
