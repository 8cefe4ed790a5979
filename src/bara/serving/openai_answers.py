"""Answers in the form of OpenAI's API, whole and in events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from bara.serving.decoding import Answer, Decoder, Token
from bara.serving.openai_schemas import ChatRequest, GenerationRequest


class Form:
    """How one request is answered.

    Args:
        decoder: of the model.
        request: a chat request, or one for completions.

    Raises:
        Problem: 400: it wants to abstain at a risk for which there is no threshold.

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

    @property
    def top(self) -> int:
        """How many tokens are listed at each place."""
        name = "top_logprobs" if self.chat else "logprobs"
        return int(getattr(self.request, name) or 0) if self.with_logprobs else 0

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
        if uncertainty.get("abstained"):  # what it would have said is taken back
            text, tokens, logprobs = "", [], None
            refusal = f"too uncertain for a risk of {self.request.abstain_at_risk:g}"
        message = {"role": "assistant", "content": text, "refusal": refusal}
        return {
            "index": index,
            **({"message": message} if self.chat else {"text": text}),
            "logprobs": logprobs,
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


def numbers(token: Token) -> dict[str, float]:
    """How sure a token is: nats."""
    return {"log_prob": token.log_prob, "total": token.total, "epistemic": token.epistemic}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens that were read and written."""
    read = sum(answer.prompt_tokens for answer in answers)
    written = sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"
