"""Requests of OpenAI's API for chat completions and completions.

What would change an answer and is not done here is refused. Some fields take the one value that
changes nothing, because clients send it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from bara.schema import Seed
from bara.serving.schemas import Draws, Messages, Share, Text, with_examples

One = Annotated[int, Field(ge=1, le=1)]
Zero = Annotated[float, Field(ge=0, le=0)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Tokens = Annotated[int, Field(ge=1)]
Top = Annotated[int, Field(ge=0, le=20)]


class StreamOptions(BaseModel):
    """What a stream has besides its answer."""

    model_config = with_examples({"include_usage": True})

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What the two routes have in common. `num_draws`, `deterministic` and `abstain_at_risk` are
    ours; the seed is that of the draws, and of tokens that are sampled.

    Without `temperature` the model decodes as its own configuration says: greedily, mostly.
    """

    model: str | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    n: One | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    user: str | None = None
    num_draws: Draws = 8
    deterministic: bool = False
    abstain_at_risk: Share | None = None

    @property
    def stops(self) -> list[str]:
        """The texts at which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatRequest(GenerationRequest):
    """A conversation to go on with."""

    model_config = with_examples(
        {"model": "assistant", "messages": [{"role": "user", "content": "Why is the sky blue?"}]},
        {
            "model": "assistant",
            "messages": [{"role": "user", "content": "Why is the sky blue?"}],
            "max_tokens": 60,
            "stream": True,
            "logprobs": True,
            "top_logprobs": 3,
            "num_draws": 8,
            "seed": 0,
        },
    )

    messages: Messages
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = False
    top_logprobs: Top | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest):
    """Texts to go on from. `prompt_logprobs`, and `echo` with `logprobs`, tell how probable their
    own tokens are."""

    model_config = with_examples(
        {"prompt": "The sky is blue because", "max_tokens": 40, "logprobs": 3},
        {"prompt": "The sky is blue.", "max_tokens": 1, "prompt_logprobs": 0},
    )

    prompt: Text | Annotated[list[Text], Field(min_length=1)]
    logprobs: Top | None = None
    best_of: One | None = None
    echo: bool | None = False
    prompt_logprobs: Top | None = None


UNCERTAINTY = {
    "score": -0.41,
    "uncertainty": 0.34,
    "total": 0.9,
    "epistemic": 0.02,
    "num_draws": 8,
    "seed": 0,
    "tokens": [{"text": "Air", "log_prob": -0.41, "total": 0.9, "epistemic": 0.02}],
}
CHAT_COMPLETION = {
    "id": "chatcmpl-0f3c",
    "object": "chat.completion",
    "created": 1760000000,
    "model": "assistant",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Air scatters it.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "uncertainty": UNCERTAINTY,
        }
    ],
    "usage": {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17},
}
COMPLETION = {
    "id": "cmpl-0f3c",
    "object": "text_completion",
    "created": 1760000000,
    "model": "assistant",
    "choices": [
        {
            "index": 0,
            "text": " air scatters it.",
            "logprobs": None,
            "finish_reason": "stop",
            "uncertainty": UNCERTAINTY,
        }
    ],
    "usage": {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11},
}
