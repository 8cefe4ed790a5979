"""Predictions and ranks of texts, requests together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bara.data.text_task import TextTask, encode_texts
from bara.errors import BaraError
from bara.evaluation.abstention import Threshold
from bara.evaluation.conformal import Conformal
from bara.language.prompts import encode_prompt, require_room
from bara.prediction.predict import predict
from bara.ranks.effective_rank import effective_rank
from bara.serving.batcher import Job
from bara.serving.limits import Limits
from bara.serving.metrics import Metrics
from bara.serving.problems import Problem
from bara.serving.schemas import PredictRequest, RankRequest, TextsRequest
from bara.serving.served import Served


@dataclass(frozen=True)
class Asked:
    """A request for predictions with what its answer takes.

    Attributes:
        request: as it came.
        texts: to predict for, each a list of one or of two.
        threshold: above which it wants to abstain.
        conformal: calibration of the sets or intervals that it wants.
    """

    request: PredictRequest
    texts: list[list[str]]
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
        texts = self._texts(request)
        self.limits.require("num_draws", request.num_draws, self.limits.draws)
        asked = Asked(request, texts, self._threshold(request), self._conformal(request))
        settings = (request.num_draws, request.seed, request.deterministic)
        draws = 1 if request.deterministic else request.num_draws
        return Job(self.run, settings, len(texts) * draws, asked, self._deadline())

    def run(self, jobs: Sequence[Job]) -> None:
        """Predicts the texts of all jobs, and gives each its answer."""
        num_draws, seed, deterministic = jobs[0].settings
        rows = self._rows([text for job in jobs for text in job.payload.texts])
        predictive = predict(
            self.served.model,
            rows,
            num_draws=num_draws,
            seed=seed,
            deterministic=deterministic,
            batch_size=self.limits.rows,
            progress=False,
        )
        start = 0
        for job in jobs:
            end = start + len(job.payload.texts)
            job.finish(self._answer(job.payload, predictive.select(slice(start, end))))
            start = end

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

    def _answer(self, asked: Asked, predictive: Any) -> dict[str, Any]:
        """What a request is answered: with a threshold, what is too uncertain has no prediction."""
        served, request = self.served, asked.request
        records = predictive.to_records()
        if asked.threshold is not None:
            declined = asked.threshold.abstains(1 - predictive.confidence).tolist()
            for record, abstained in zip(records, declined, strict=True):
                record["abstained"] = abstained
                if abstained:
                    record["prediction"] = None
        if asked.conformal is not None and request.coverage is not None:
            sets = asked.conformal.to_records(predictive, request.coverage)
            for record, more in zip(records, sets, strict=True):
                record |= more
        for record in records:
            self.metrics.told_answer(
                served.name, record["epistemic"], record.get("abstained", False)
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
            if not texts or request.pairs:
                raise Problem(400, "give texts or messages", param="texts")
            self.limits.require("texts", len(texts), self.limits.texts)
        elif request.messages:
            raise Problem(400, f"{self.served.name} reads texts", param="messages")
        else:
            texts = self._texts(request)
        return Job(self.run_ranks, (), len(texts), texts, self._deadline())

    def run_ranks(self, jobs: Sequence[Job]) -> None:
        """The rank of every layer for the texts of each job: the layer's name, r, mean in use."""
        rows = self._rows([text for job in jobs for text in job.payload])
        found = effective_rank(self.served.model, rows, batch_size=self.limits.rows, progress=False)
        start = 0
        for job in jobs:
            end = start + len(job.payload)
            means = found.soft[:, start:end].mean(1).tolist()
            job.finish(list(zip(found.layers, found.max_rank, means, strict=True)))
            start = end

    # -- inputs --------------------------------------------------------------------------------

    def _deadline(self) -> float:
        return time.monotonic() + self.limits.seconds

    def _texts(self, request: TextsRequest) -> list[list[str]]:
        """The texts, each as a list of one or of two."""
        task = self.served.task
        if not isinstance(task, TextTask):
            raise Problem(
                400,
                f"{self.served.name} is a language model: use /v1/chat/completions or "
                "/v1/completions",
                param="model",
            )
        pairs = task.text_pair_column is not None
        wanted, other = ("pairs", "texts") if pairs else ("texts", "pairs")
        if getattr(request, other) is not None:
            raise Problem(400, f"{self.served.name} reads {wanted}, not {other}", param=other)
        given: list[Any] | None = getattr(request, wanted)
        if given is None:
            raise Problem(400, f"{wanted} is missing", param=wanted)
        self.limits.require(wanted, len(given), self.limits.texts)
        texts = [text if pairs else [text] for text in given]
        for number, text in enumerate(texts):
            if not all(part.strip() for part in text):
                raise Problem(400, f"{wanted}.{number} is empty", param=wanted)
        return texts

    def _rows(self, texts: Sequence[Any]) -> list[dict[str, Any]]:
        """Inputs of the model."""
        task, tokenizer = self.served.task, self.served.tokenizer
        if isinstance(task, TextTask):
            parts = [list(part) for part in zip(*texts, strict=True)]
            columns = encode_texts(parts, tokenizer, task)
            return [
                dict(zip(columns, values, strict=True))
                for values in zip(*columns.values(), strict=True)
            ]
        rows = []
        for text in texts:
            try:
                ids = encode_prompt(tokenizer, text)
                require_room(self.served.model, len(ids))
            except BaraError as error:
                raise Problem(400, str(error), param="texts") from error
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
        return rows
