"""Answers of a language model, requests together, token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from bara.draws.sharing import decoding
from bara.errors import BaraError
from bara.evaluation.abstention import Threshold
from bara.language.generation import MAX_NEW_TOKENS, DrawSampler
from bara.language.inputs import Inputs, read_prompts
from bara.language.likelihood import Reading, read_tokens
from bara.language.prompts import Prompt, context, require_room
from bara.language.streaming import StreamedToken, decode_rows
from bara.serving.batcher import Job
from bara.serving.limits import Limits
from bara.serving.metrics import Metrics
from bara.serving.openai_schemas import GenerationRequest
from bara.serving.problems import Problem
from bara.serving.served import Served
from bara.serving.stops import StopText


class Top(NamedTuple):
    """A token that could have been chosen, and its log-probability under the mixture."""

    text: str
    log_prob: float


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        shown: what can be shown of the answer once it has come.
        text: what it adds to the text, of the answer and of a stop.
        name: the token itself, also where it adds nothing.
        log_prob, total, epistemic: as of `bara.StreamedToken`.
        top: the most probable tokens in its place.
    """

    shown: str
    text: str
    name: str
    log_prob: float
    total: float
    epistemic: float
    top: tuple[Top, ...]


@dataclass(eq=False)
class Answer:
    """One answer while it is decoded, and afterwards.

    Attributes:
        prompt: what was asked.
        wanted: most new tokens; None for the default.
        stop: where its text ends.
        top: how many tokens are listed at each place.
        reads: how many tokens are listed at each place of the prompt; None if it is not scored.
        listener: is told of every token in the decoding thread.
        prompt_ids: tokens of the prompt.
        reading: what the mixture makes of them, if they are scored.
        most: new tokens that it may have.
        tokens: what has been decoded.
        text: what can be shown of it.
        finish_reason: `stop` or `length`, once it has ended.
        num_draws: draws that it was decoded with; 1 for the posterior mean.
    """

    prompt: Prompt
    wanted: int | None
    stop: StopText
    top: int
    reads: int | None = None
    listener: Callable[[Token], None] | None = None
    prompt_ids: list[int] = field(default_factory=list)
    reading: Reading | None = None
    most: int = 0
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    num_draws: int = 1

    def take(self, token: StreamedToken, name: str, top: tuple[Top, ...], ends: bool) -> bool:
        """Adds a token; whether the answer has ended with it."""
        shown = self.stop.add(token.text)
        if ends or self.stop.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) + 1 >= self.most:
            self.finish_reason = "length"
        if self.finish_reason and not self.stop.stopped:
            shown += self.stop.rest()
        self.text += shown
        numbers = (token.log_prob, token.total, token.epistemic)
        self.tokens.append(Token(shown, token.text, name, *numbers, top))
        if self.listener is not None:
            self.listener(self.tokens[-1])
        return self.finish_reason is not None

    @property
    def score(self) -> float:
        """Mean log-probability of the tokens, as `bara.Generation.score`."""
        return sum(token.log_prob for token in self.tokens) / len(self.tokens)

    @property
    def uncertainty(self) -> float:
        """1 - exp(score), as `bara.Generation.uncertainty`."""
        return 1 - math.exp(self.score)

    def mean(self, name: str) -> float:
        """Mean over the tokens of `total` or `epistemic`."""
        values: list[float] = [getattr(token, name) for token in self.tokens]
        return sum(values) / len(values)


class Decoder:
    """Generates with one language model, answers to several requests in one batch.

    Requests share a batch if they want the same draws (number and seed) and decode greedily:
    sampled tokens would depend on who else is there. Each row ends by itself; nobody joins a batch
    that has begun (docs/limits.md says why).

    Args:
        served: the model.
        limits: of the server.
        metrics: is told of every answer.
    """

    def __init__(self, served: Served, limits: Limits, metrics: Metrics) -> None:
        self.served = served
        self.limits = limits
        self.metrics = metrics

    def options(self, request: GenerationRequest) -> dict[str, Any]:
        """What `bara.generate` would be given for the request, but for the length.

        Raises:
            Problem: 400: `top_p` without `temperature`, which nothing would read.
        """
        options: dict[str, Any] = {}
        if request.temperature:
            options |= {"do_sample": True, "temperature": request.temperature}
            if request.top_p is not None:
                options["top_p"] = request.top_p
        elif request.temperature == 0 and self._samples(options):
            options["do_sample"] = False
        elif request.temperature is None and (request.top_p or 1) < 1:
            raise Problem(400, "top_p needs a temperature above 0", param="top_p")
        return options

    def _samples(self, options: dict[str, Any]) -> bool:
        default = getattr(self.served.model.generation_config, "do_sample", False)
        return bool(options.get("do_sample", default))

    def threshold(
        self, request: GenerationRequest, wanted: int | None, chat: bool
    ) -> Threshold | None:
        """The threshold that a request wants to abstain with; None if it does not.

        Raises:
            Problem: 400: there is none that was calibrated under the request's options.
        """
        if request.abstain_at_risk is None:
            return None
        length = {} if wanted is None else {"max_new_tokens": wanted}
        stops = {"stop": request.stops} if request.stops else {}
        mean = {"deterministic": True} if request.deterministic else {}
        return self.served.threshold(
            request.abstain_at_risk,
            measure="answers",
            num_draws=request.num_draws,
            seed=request.seed or 0,
            chat=chat,
            decoding=length | self.options(request) | stops | mean,
        )

    def jobs(
        self,
        request: GenerationRequest,
        prompts: Sequence[Prompt],
        wanted: int | None,
        top: int,
        reads: int | None,
    ) -> list[Job]:
        """The work of a request: a job for each prompt; the last three are those of `Answer`.

        Raises:
            Problem: 400: too many prompts, tokens or draws.
        """
        limits = self.limits
        limits.require("prompt", len(prompts), limits.texts)
        limits.require("num_draws", request.num_draws, limits.draws)
        if wanted is not None:
            limits.require("max_tokens", wanted, limits.tokens)
        options = self.options(request)
        alone = object() if self._samples(options) else None
        draws = (request.num_draws, request.seed or 0, request.deterministic)
        settings = (*draws, tuple(options.items()), alone)
        deadline = time.monotonic() + limits.seconds
        rows = 1 if request.deterministic else request.num_draws
        answers = [
            Answer(prompt, wanted, StopText(request.stops), top, reads) for prompt in prompts
        ]
        return [Job(self.run, settings, rows, answer, deadline) for answer in answers]

    def run(self, jobs: Sequence[Job]) -> None:
        """Decodes the answers of all jobs, together if they fit into the context together."""
        ready = [(job, asked) for job in jobs if (asked := self._encode(job))]
        if not ready:
            return
        longest = max(asked.longest for _, asked in ready)
        most = max(job.payload.most for job, _ in ready)
        fits = longest + most <= context(self.served.model)
        for group in [ready] if fits else [[one] for one in ready]:
            self._decode([job for job, _ in group], [asked for _, asked in group])

    def _encode(self, job: Job) -> Inputs | None:
        """A job's prompt; None, and the job has failed, if it cannot be answered."""
        answer: Answer = job.payload
        try:
            asked = read_prompts(self.served.model, self.served.tokenizer, [answer.prompt])
            room = context(self.served.model) - asked.longest
            answer.most = answer.wanted or max(1, min(MAX_NEW_TOKENS, self.limits.tokens, room))
            require_room(self.served.model, asked.longest, answer.most)
        except BaraError as error:
            job.fail(Problem(400, str(error), param="prompt"))
            return None
        answer.prompt_ids = asked.rows[0]
        if answer.reads is not None and asked.longest > self.limits.tokens:
            most = self.limits.tokens
            message = f"a prompt of {asked.longest} tokens is not scored here: at most {most}"
            job.fail(Problem(400, message, param="prompt"))
            return None
        return asked

    def _decode(self, jobs: list[Job], asked: list[Inputs]) -> None:
        num_draws, seed, deterministic, options, _ = jobs[0].settings
        served = self.served
        most = max(job.payload.most for job in jobs)
        try:
            sampler = DrawSampler(
                served.model,
                served.tokenizer,
                max(one.longest for one in asked),
                num_draws,
                seed,
                deterministic,
                {**dict(options), "max_new_tokens": most},
            )
        except BaraError as error:  # the method has no draws that could be decoded together
            raise Problem(400, str(error), param="deterministic") from error

        def take(row: int, token: StreamedToken, log_probs: Tensor) -> bool:
            job = jobs[row]
            answer: Answer = job.payload
            if job.over:
                return True
            job.started = True
            answer.num_draws = sampler.draws.num_draws
            if answer.take(
                token, self.name(token.token), self._top(answer, log_probs), token.token in ends
            ):
                self.metrics.tokens.labels(served.name).inc(len(answer.tokens))
                job.finish(answer)
                return True
            return False

        ends = sampler.ends
        inputs = asked[0].stack([row for one in asked for row in one.rows])
        for job in jobs:
            self._read(job)
        with decoding(served.model):
            decode_rows(sampler, inputs, seed, take)

    def _read(self, job: Job) -> None:
        """Scores the tokens of a prompt, if that was asked for."""
        answer: Answer = job.payload
        if answer.reads is None or job.over:
            return
        num_draws, seed, deterministic, *_ = job.settings
        answer.reading = read_tokens(
            self.served.model,
            answer.prompt_ids,
            num_draws=num_draws,
            seed=seed,
            deterministic=deterministic,
            top=answer.reads,
            batch_size=self.limits.rows,
        )

    def _top(self, answer: Answer, log_probs: Tensor) -> tuple[Top, ...]:
        if not answer.top:
            return ()
        values, tokens = log_probs.topk(min(answer.top, len(log_probs)))
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        return tuple(Top(self.name(token), value) for token, value in pairs)

    def name(self, token: int) -> str:
        """A token as text."""
        return str(self.served.tokenizer.decode([token]))
