"""Text from a mixture over posterior draws, token by token while it is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from queue import Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from bara.draws.sharing import decoding
from bara.errors import BaraError
from bara.language.generation import DrawSampler, Pieces, Step, seeded
from bara.language.inputs import Inputs, read_prompts
from bara.language.prompts import Prompt, require_generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StreamedToken:
    """A token of the mixture's answer; the numbers are those of `bara.Generation`, in nats.

    Attributes:
        text: what it adds to the text; empty for special tokens and unfinished characters.
        token: its id.
        log_prob: its log-probability under the mixture.
        total: entropy of the distribution that it was chosen from.
        epistemic: mutual information between it and the draw.
    """

    text: str
    token: int
    log_prob: float
    total: float
    epistemic: float


def generate_stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Mapping[str, Tensor],
    *,
    num_draws: int = 8,
    seed: int = 0,
    deterministic: bool = False,
    **options: Any,
) -> Iterator[StreamedToken]:
    """Yields the tokens of `bara.generate`'s answer to one prompt as soon as they are chosen.

    Decoding runs in a thread of its own, one token ahead; it stops when the iterator is closed.
    Until then the model decodes nothing else. With `do_sample` tokens are drawn from torch's
    global generator: they are those of `bara.generate` if nothing else draws from it meanwhile.

    Args:
        prompt: a text, a conversation, or one row of a processor's tensors.
        model, tokenizer, num_draws, seed, deterministic, options: as in `bara.generate`; one beam.

    Raises:
        BaraError: beam search, or any error of `bara.generate`.
    """
    require_generator(model, "bara.generate_stream")
    asked = read_prompts(model, tokenizer, prompt if isinstance(prompt, Mapping) else [prompt])
    if len(asked.rows) > 1:
        raise BaraError(f"A stream answers one prompt, not {len(asked.rows)}: use bara.generate.")
    longest = asked.longest
    sampler = DrawSampler(model, tokenizer, longest, num_draws, seed, deterministic, options)
    if sampler.rows_per_prompt > sampler.draws.num_draws:
        raise BaraError(
            "Beams are chosen at the end, so they cannot be streamed: use bara.generate, or "
            "bara generate --output FILE."
        )
    return _stream(sampler, asked, seed)


def _stream(sampler: DrawSampler, asked: Inputs, seed: int) -> Iterator[StreamedToken]:
    queue: Queue[tuple[int, Step] | BaseException | None] = Queue(maxsize=1)
    closed = Event()

    def decode() -> None:
        try:
            with decoding(sampler.model, stream=True), seeded(seed), sampler.mixed() as steps:
                criteria = sampler.options.get("stopping_criteria") or []
                sampler.run(
                    asked.batch(),
                    streamer=_Streamer(queue, steps),
                    stopping_criteria=StoppingCriteriaList([*criteria, _Closed(closed)]),
                )
        except BaseException as error:
            queue.put(error)
        queue.put(None)

    thread = Thread(target=decode, daemon=True)
    thread.start()
    try:
        pieces = Pieces(sampler.tokenizer)
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            token, step = item
            total, aleatoric = float(step.total[0]), float(step.aleatoric[0])
            log_prob = float(step.log_probs[0, token])
            yield StreamedToken(
                pieces.add(token), token, log_prob, total, max(0.0, total - aleatoric)
            )
    finally:
        closed.set()
        while thread.is_alive():
            while not queue.empty():
                queue.get()
            thread.join(timeout=0.01)


class _Streamer(BaseStreamer):
    """Puts every chosen token with its step into a queue; the first call brings the prompt."""

    def __init__(self, queue: Queue[Any], steps: list[Step]) -> None:
        self.queue = queue
        self.steps = steps
        self.position = -1

    def put(self, value: Tensor) -> None:
        if self.position >= 0:
            self.queue.put((int(value[0]), self.steps[self.position]))
        self.position += 1

    def end(self) -> None:
        pass


class _Closed(StoppingCriteria):
    """Ends decoding when nobody listens any more."""

    def __init__(self, closed: Event) -> None:
        self.closed = closed

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids.new_full((len(input_ids),), self.closed.is_set(), dtype=torch.bool)
