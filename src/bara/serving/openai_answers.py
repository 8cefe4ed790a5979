"""Answers in the form of OpenAI's API, whole and in events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from bara.language.generation import Pieces
from bara.language.likelihood import Reading
from bara.serving.decoding import Answer, Decoder, Token
from bara.serving.openai_schemas import ChatRequest, GenerationRequest
from bara.serving.problems import Problem


class Form:
    """How one request is answered.

    Args:
        decoder: of the model.
        request: a chat request, or one for completions.

    Raises:
        Problem: 400: it wants to abstain at a risk for which there is no threshold, or its prompt
            in a stream.

    Attributes:
        wanted: most new tokens of an answer, if it says so.
    """

    def __init__(self, decoder: Decoder, request: GenerationRequest) -> None:
        self.decoder = decoder
        self.request = request
        self.chat = isinstance(request, ChatRequest)
        self.wanted = getattr(request, "max_completion_tokens", None) or request.max_tokens
        self.threshold = decoder.threshold(request, self.wanted, self.chat)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        asked = getattr(request, "logprobs", None)
        self.with_logprobs = bool(asked) if self.chat else asked is not None
        self.echo = bool(getattr(request, "echo", False))
        self.prompt_top: int | None = getattr(request, "prompt_logprobs", None)
        if self.chat and getattr(request, "top_logprobs", None) and not asked:
            raise Problem(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        for name, wanted in (("echo", self.echo), ("prompt_logprobs", self.prompt_top is not None)):
            if wanted and request.stream:
                raise Problem(400, f"{name} is not there for a stream", param=name)

    @property
    def top(self) -> int:
        """How many tokens are listed at each place."""
        name = "top_logprobs" if self.chat else "logprobs"
        return int(getattr(self.request, name) or 0) if self.with_logprobs else 0

    @property
    def reads(self) -> int | None:
        """How many tokens are listed at each place of the prompt; None if it is not scored."""
        echoed = self.top if self.echo and self.with_logprobs else None
        wanted = [number for number in (echoed, self.prompt_top) if number is not None]
        return max(wanted, default=None)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return self._envelope(kind, choices) | {"usage": usage(answers)}

    def opening(self, count: int) -> list[str]:
        """Events before the first token: in a chat who speaks."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._event([{"index": i, "delta": delta, "finish_reason": None}]) for i in range(count)
        ]

    def token(self, index: int, token: Token) -> str:
        """The event of a token."""
        choice: dict[str, Any] = {"index": index, **self._piece(token.shown)}
        choice |= {"logprobs": self._logprobs([token]), "finish_reason": None}
        return self._event([choice | {"uncertainty": numbers(token)}])

    def closing(self, index: int, answer: Answer) -> str:
        """The event at the end of an answer."""
        piece: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        choice = {"index": index, **piece, "logprobs": None, "finish_reason": answer.finish_reason}
        return self._event([choice | {"uncertainty": self._uncertainty(answer)}])

    def usage(self, answers: Sequence[Answer]) -> str:
        """The event that counts tokens, where it was asked for."""
        return event(self._envelope(self._chunk, []) | {"usage": usage(answers)})

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = self.decoder.served.name
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": name,
            "choices": choices,
        }

    def _event(self, choices: list[dict[str, Any]]) -> str:
        return event(self._envelope(self._chunk, choices))

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if self.chat else {"text": text}

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        uncertainty = self._uncertainty(answer)
        tokens = [{"text": token.text, **numbers(token)} for token in answer.tokens]
        text, refusal, logprobs = answer.text, None, self._logprobs(answer.tokens)
        if self.echo:
            text = f"{answer.prompt}{text}"
            logprobs = logprobs and self._echoed(answer, logprobs)
        if uncertainty.get("abstained"):  # what it would have said is taken back
            text, tokens, logprobs = "", [], None
            refusal = f"too uncertain for a risk of {self.request.abstain_at_risk:g}"
        message = {"role": "assistant", "content": text, "refusal": refusal}
        scored = {}
        if self.prompt_top is not None:
            scored = {"prompt_logprobs": self._prompt_logprobs(answer, self.prompt_top)}
        return {
            "index": index,
            **({"message": message} if self.chat else {"text": text}),
            "logprobs": logprobs,
            **scored,
            "finish_reason": answer.finish_reason,
            "uncertainty": {**uncertainty, "tokens": tokens},
        }

    def _uncertainty(self, answer: Answer) -> dict[str, Any]:
        """Of a whole answer, in nats; the metrics are told too.

        `uncertainty` is what thresholds are calibrated on.
        """
        values: dict[str, Any] = {
            "score": answer.score,
            "uncertainty": answer.uncertainty,
            "total": answer.mean("total"),
            "epistemic": answer.mean("epistemic"),
            "num_draws": answer.num_draws,
            "seed": self.request.seed or 0,
        }
        if self.threshold is not None:
            values["abstained"] = bool(self.threshold.abstains(answer.uncertainty))
        self.decoder.metrics.told_answer(
            self.decoder.served.name, values["epistemic"], values.get("abstained", False)
        )
        return values

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """The mixture's log-probabilities, in the form of the route."""
        if not self.with_logprobs:
            return None
        if self.chat:
            return {"content": [self._listed_token(token) for token in tokens], "refusal": None}
        offsets, at = [], 0
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        return {
            "tokens": [token.name for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": [
                # two tokens may be written alike: the more probable one comes first
                {top.text: top.log_prob for top in reversed(token.top)}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _echoed(self, answer: Answer, logprobs: dict[str, Any]) -> dict[str, Any]:
        """The log-probabilities of a completion with those of its prompt before them."""
        assert answer.reading is not None
        pieces, offsets, at = Pieces(self.decoder.served.tokenizer), [], 0
        for token in answer.prompt_ids:
            offsets.append(at)
            at += len(pieces.add(token))
        listed = [tops[: self.top] for tops in _tops(answer.reading)]
        before = {
            "tokens": [self.decoder.name(token) for token in answer.prompt_ids],
            "token_logprobs": [None, *answer.reading.log_probs.tolist()],
            "top_logprobs": [
                None,
                *({self.decoder.name(t): value for t, value in reversed(tops)} for tops in listed),
            ],
            "text_offset": offsets,
        }
        begins = len(str(answer.prompt))
        after = logprobs | {"text_offset": [begins + at for at in logprobs["text_offset"]]}
        return {name: before[name] + after[name] for name in before}

    def _prompt_logprobs(self, answer: Answer, most: int) -> list[dict[str, Any] | None]:
        """vLLM's form: nothing for the first token, then by token's number the token itself and
        the most probable ones."""
        assert answer.reading is not None
        own = zip(
            answer.prompt_ids[1:],
            answer.reading.log_probs.tolist(),
            answer.reading.ranks.tolist(),
            strict=True,
        )
        places: list[dict[str, Any] | None] = [None]
        for (token, log_prob, rank), tops in zip(own, _tops(answer.reading), strict=True):
            ranked = [(t, value, place) for place, (t, value) in enumerate(tops[:most], start=1)]
            places.append(
                {
                    str(t): {"logprob": value, "rank": r, "decoded_token": self.decoder.name(t)}
                    for t, value, r in [(token, log_prob, rank), *ranked]
                }
            )
        return places

    @staticmethod
    def _listed_token(token: Token) -> dict[str, Any]:
        return {
            "token": token.name,
            "logprob": token.log_prob,
            "bytes": list(token.text.encode()),
            "top_logprobs": [
                {"token": top.text, "logprob": top.log_prob, "bytes": list(top.text.encode())}
                for top in token.top
            ],
        }


def _tops(reading: Reading) -> list[list[tuple[int, float]]]:
    """At each place the most probable tokens, and their log-probabilities."""
    both = zip(reading.top.tolist(), reading.top_log_probs.tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in both]


def numbers(token: Token) -> dict[str, float]:
    """How sure a token is: nats."""
    return {"log_prob": token.log_prob, "total": token.total, "epistemic": token.epistemic}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens that were read and written."""
    read = sum(len(answer.prompt_ids) for answer in answers)
    written = sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"
