"""How likely texts are: whole continuations under every draw, and tokens under the mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bara.draws.blocks import Blocks
from bara.draws.portions import Portions
from bara.draws.sharing import evaluating
from bara.errors import BaraError
from bara.language.prompts import require_decoder, require_room
from bara.prediction.batches import progress_bar, to_device
from bara.prediction.likelihood import require_finite

MOST_LOGITS = 2**27
"""Numbers that the logits of one pass of `read_tokens` have: half a gigabyte."""


def continuation_log_probs(
    model: nn.Module,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    num_draws: int = 10,
    seed: int = 0,
    deterministic: bool = False,
    batch_size: int = 64,
    progress: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of continuations, each under every draw.

    Args:
        model: a causal language model, with an adapter or without (then it is one draw).
        pairs: token ids of what comes before, at least one, and of what follows.
        num_draws, seed, deterministic, batch_size, progress: as in `bara.predict`.

    Returns:
        The log-probability of all tokens of each continuation, in nats, (S, n); and whether each
        token of it is the one that the mixture finds most likely there, as greedy decoding by
        `bara.generate` would choose it, (n,).

    Raises:
        BaraError: not a causal language model, nothing on one side of a pair, a pair longer than
            the context, logits that are not finite, num_draws or batch_size < 1.
    """
    require_decoder(model, "continuation_log_probs")
    if num_draws < 1 or batch_size < 1:
        raise BaraError("num_draws and batch_size must be at least 1.")
    if not all(before and after for before, after in pairs):
        raise BaraError("A continuation, or what comes before it, has no tokens.")
    require_room(model, max((len(b) + len(a) - 1 for b, a in pairs), default=0))
    draws = Portions(model, None if deterministic else num_draws, seed)
    log_probs = torch.empty(draws.num_draws, len(pairs))
    greedy = torch.empty(len(pairs), dtype=torch.bool)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    size = max(1, batch_size // draws.num_draws)
    starts = range(0, len(order), size)
    with evaluating(model):
        for start in progress_bar(starts, description="reading", progress=progress):
            index = order[start : start + size]
            part = [pairs[i] for i in index]
            log_probs[:, index], greedy[index] = _likelihood(model, draws, part, batch_size)
    return log_probs, greedy


def _likelihood(
    model: nn.Module,
    draws: Portions,
    pairs: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """What `continuation_log_probs` returns, of one batch."""
    device = next(model.parameters()).device
    inputs, where = _batch(pairs, device)
    targets = torch.cat([torch.tensor(after) for _, after in pairs]).to(device)
    mixture: list[Tensor] = []

    def run(blocks: Blocks) -> Tensor:
        """Log-probabilities of the continuations' tokens, (S, tokens)."""
        logits = require_finite(model(**blocks.repeat(inputs)).logits)
        every = blocks.split(logits)[:, where].float().log_softmax(-1)
        mixture[:] = [torch.logsumexp(torch.cat([*mixture, every]), 0, keepdim=True)]
        return every.gather(-1, targets.expand(len(every), -1).unsqueeze(-1)).squeeze(-1)

    by_token = torch.cat(draws.map(run, len(pairs), batch_size)).cpu()
    right = mixture[0][0].argmax(-1).eq(targets).cpu()
    lengths = [len(after) for _, after in pairs]
    found = torch.stack([part.sum(1) for part in by_token.split(lengths, 1)], 1)
    return found, torch.stack([part.all() for part in right.split(lengths)])


@dataclass(frozen=True)
class Reading:
    """How the mixture over draws expects a text's T tokens, each after those before it.

    The first token has nothing before it and is left out. The product over the places is not the
    mixture's probability of the whole text, for which see `continuation_log_probs`: there a draw
    keeps its weight from the first token to the last.

    Attributes:
        log_probs: (T - 1,) log-probability of each token, in nats.
        ranks: (T - 1,) its place among all tokens, 1 for the most probable.
        top: (T - 1, k) the most probable tokens.
        top_log_probs: (T - 1, k) of these.
    """

    log_probs: Tensor
    ranks: Tensor
    top: Tensor
    top_log_probs: Tensor


def read_tokens(
    model: nn.Module,
    ids: Sequence[int],
    *,
    num_draws: int = 10,
    seed: int = 0,
    deterministic: bool = False,
    top: int = 0,
    batch_size: int = 64,
) -> Reading:
    """Reads one text: what `bara.generate` would have made of each place if it had got there.

    Args:
        model: a causal language model, with an adapter or without.
        ids: (T,) the text's tokens.
        num_draws, seed, deterministic, batch_size: as in `bara.predict`.
        top: k, how many of the most probable tokens are kept.

    Raises:
        BaraError: not a causal language model, no tokens or more than the context has, logits that
            are not finite, num_draws or batch_size < 1.
    """
    require_decoder(model, "read_tokens")
    if num_draws < 1 or batch_size < 1:
        raise BaraError("num_draws and batch_size must be at least 1.")
    if not ids:
        raise BaraError("The text has no tokens.")
    require_room(model, len(ids))
    draws = Portions(model, None if deterministic else num_draws, seed)
    text = torch.tensor([list(ids)], device=next(model.parameters()).device)
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    config: Any = model.config
    fits = MOST_LOGITS // (len(ids) * config.get_text_config().vocab_size)
    mixture: list[Tensor] = []

    def run(blocks: Blocks) -> None:
        logits = require_finite(model(**blocks.repeat(inputs)).logits)
        every = blocks.split(logits)[:, 0, :-1].float().log_softmax(-1)
        mixture[:] = [torch.cat([*mixture, every]).logsumexp(0, keepdim=True)]

    with evaluating(model):
        draws.map(run, 1, max(1, min(batch_size, fits)))
    log_probs = mixture[0][0] - math.log(draws.num_draws)
    found = log_probs.gather(-1, text[0, 1:, None])
    best = log_probs.topk(min(top, log_probs.shape[-1]))
    ranks = (log_probs > found).sum(-1) + 1
    return Reading(found[:, 0].cpu(), ranks.cpu(), best.indices.cpu(), best.values.cpu())


def _batch(
    pairs: Sequence[tuple[list[int], list[int]]], device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """Inputs, padded on the right, and the positions (n, T) whose next token is scored."""
    rows = [torch.tensor([*before, *after[:-1]]) for before, after in pairs]
    ids = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    first = torch.tensor([len(before) - 1 for before, _ in pairs]).unsqueeze(1)
    position = torch.arange(ids.shape[1])
    inside = position < lengths
    inputs = to_device({"input_ids": ids, "attention_mask": inside.long()}, device)
    return inputs, (inside & (position >= first)).to(device)
