"""Text from a mixture over posterior draws, token by token while it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from queue import Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from bara.draws.sharing import decoding
from bara.errors import BaraError
from bara.language.generation import DrawSampler, Pieces, Step, seeded
from bara.language.inputs import Inputs, read_prompts
from bara.language.prompts import Prompt, require_generator
from bara.prediction.batches import num_rows

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


Take = Callable[[int, StreamedToken, Tensor], bool]
"""What `decode_rows` hands every token to."""


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
    queue: Queue[StreamedToken | BaseException | None] = Queue(maxsize=1)
    closed = Event()

    def take(row: int, token: StreamedToken, log_probs: Tensor) -> bool:
        queue.put(token)
        return closed.is_set()

    def decode() -> None:
        try:
            with decoding(sampler.model, stream=True):
                decode_rows(sampler, asked.batch(), seed, take)
        except BaseException as error:
            queue.put(error)
        queue.put(None)

    thread = Thread(target=decode, daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        while thread.is_alive():
            while not queue.empty():
                queue.get()
            thread.join(timeout=0.01)


def decode_rows(sampler: DrawSampler, inputs: Mapping[str, Any], seed: int, take: Take) -> None:
    """Decodes prompts together and hands on every token when it is chosen.

    Whoever calls it holds `bara.draws.sharing.decoding`.

    Args:
        sampler: of the model, without beams.
        inputs: a batch of prompts, as `Inputs.batch` makes it.
        seed: of the tokens where they are sampled.
        take: is given a row's number, its token and the distribution (V,) that the token was chosen
            from, as log-probabilities; whether the row ends here. It is not asked again about a row
            that has ended, by itself or with an end-of-text token.

    Raises:
        BaraError: any error of decoding.
    """
    with seeded(seed), sampler.mixed() as steps:
        given = sampler.options.get("stopping_criteria") or []
        listener = _Listener(sampler, num_rows(inputs), steps, take)
        sampler.run(
            dict(inputs),
            stopping_criteria=StoppingCriteriaList([*given, listener]),
        )


class _Listener(StoppingCriteria):
    """Is called after every step with all tokens so far, and says which rows have ended.

    The steps that it has read are dropped: they hold a distribution for each row.
    """

    def __init__(self, sampler: DrawSampler, rows: int, steps: list[Step], take: Take) -> None:
        self.pieces = [Pieces(sampler.tokenizer) for _ in range(rows)]
        self.ends = sampler.ends
        self.steps = steps
        self.take = take
        self.ended = [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        step = self.steps[-1]
        self.steps.clear()
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self.ended[row]:
                ends = self.take(row, self._streamed(row, token, step), step.log_probs[row])
                self.ended[row] = ends or token in self.ends
        return torch.tensor(self.ended, device=input_ids.device)

    def _streamed(self, row: int, token: int, step: Step) -> StreamedToken:
        total, aleatoric = float(step.total[row]), float(step.aleatoric[row])
        log_prob = float(step.log_probs[row, token])
        text = self.pieces[row].add(token)
        return StreamedToken(text, token, log_prob, total, max(0.0, total - aleatoric))
