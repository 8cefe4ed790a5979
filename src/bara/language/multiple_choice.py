"""Multiple-choice questions to a causal language model: probabilities averaged over draws."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bara.draws.blocks import Blocks
from bara.draws.portions import Portions
from bara.draws.sharing import evaluating
from bara.errors import BaraError
from bara.language.prompts import encode_completion, left_padded, require_decoder, require_room
from bara.language.question import LETTERS, Question, Scoring
from bara.prediction.batches import progress_bar, to_device
from bara.prediction.likelihood import require_finite
from bara.prediction.predictive import ClassificationPredictive
from bara.prediction.temperature import get_temperature

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = Sequence[tuple[list[int], list[list[int]]]]
"""Token ids of each question's prompt and of its choices."""


def multiple_choice(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question | Mapping[str, Any]],
    *,
    scoring: Scoring = "text",
    num_draws: int = 10,
    seed: int = 0,
    deterministic: bool = False,
    batch_size: int = 64,
    progress: bool | None = None,
) -> ClassificationPredictive:
    """Probabilities over the choices of every question.

    Under one draw they are the softmax of the choices' scores, divided by the model's fitted
    temperature if it has one (`bara.methods.set_temperature`). A choice's score is the mean
    log-probability of its tokens after "Question: ...\\nAnswer:" (`text`), or the log-probability
    of its letter after a prompt that lists the choices (`letter`). The prompt is encoded once per
    draw; its key-value cache serves all choices.

    Args:
        model: a causal language model of transformers, with an adapter of PEFT or without (then it
            is one draw).
        tokenizer: the model's tokeniser.
        questions: `Question`s, or mappings with `question` (or `prompt`, which is read word for
            word), `choices` and, for reference, `answer` (an index, a letter, or the choice's
            text).
        scoring: `text` or `letter`.
        num_draws, seed, deterministic: as in `bara.predict`.
        batch_size: most rows, questions or choices times draws, in one forward pass.
        progress: show a progress bar on standard error; None does so on a terminal.

    Returns:
        A predictive of n questions and C classes, C the largest number of choices, named A, B, ...
        Choices that a question does not have get probability 0. `labels` are the answers if all
        questions have one.

    Raises:
        BaraError: not a causal language model, a question that makes no sense or does not fit the
            context, logits that are not finite, num_draws or batch_size < 1.
    """
    require_decoder(model, "bara.multiple_choice")
    if scoring not in ("text", "letter"):
        raise BaraError(f"scoring must be 'text' or 'letter', not {scoring!r}.")
    if num_draws < 1 or batch_size < 1:
        raise BaraError("num_draws and batch_size must be at least 1.")
    asked = [
        item if isinstance(item, Question) else Question.from_record(item, f"Question number {i}")
        for i, item in enumerate(questions)
    ]
    if not asked:
        raise BaraError("There is no question: give at least one.")
    encoded = [encode_choices(tokenizer, question, scoring) for question in asked]
    require_room(model, max(len(prompt) + max(map(len, ends)) for prompt, ends in encoded))
    draws = Portions(model, None if deterministic else num_draws, seed)
    temperature = get_temperature(model)
    most = max(len(question.choices) for question in asked)
    log_probs = torch.full((draws.num_draws, len(asked), most), -torch.inf)
    with evaluating(model):
        lengths = [len(prompt) for prompt, _ in encoded]
        for index in _batches(lengths, draws.num_draws, batch_size, progress):
            part = [encoded[i] for i in index]
            run = partial(_scores, model, tokenizer, part, batch_size)
            portions = draws.map(run, len(index), batch_size)
            for i, *scores in zip(index, *portions, strict=True):
                tempered = (torch.cat(scores) / temperature).log_softmax(-1)
                log_probs[:, i, : tempered.shape[1]] = tempered
    answers = [q.answer for q in asked]
    labels = None if None in answers else torch.tensor(answers)
    return ClassificationPredictive(log_probs, labels, tuple(LETTERS[: log_probs.shape[2]]))


def encode_choices(
    tokenizer: PreTrainedTokenizerBase, question: Question, scoring: Scoring
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt and of each choice."""
    prompt = question.prompt(scoring)
    pairs = [encode_completion(tokenizer, prompt, c) for c in question.completions(scoring)]
    return pairs[0][0], [end for _, end in pairs]


def _batches(
    lengths: Sequence[int], num_draws: int, batch_size: int, progress: bool | None
) -> Iterator[list[int]]:
    """Questions of similar length, together as many as the batch size allows."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    size = max(1, batch_size // num_draws)
    starts = range(0, len(order), size)
    for start in progress_bar(starts, description="answering", progress=progress):
        yield order[start : start + size]


@torch.no_grad()
def _scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    batch_size: int,
    blocks: Blocks,
) -> list[Tensor]:
    """Mean log-probability of every choice's tokens, (S, choices) for each question."""
    device, num_draws = next(model.parameters()).device, blocks.num_draws
    prompts = left_padded(tokenizer, [prompt for prompt, _ in encoded])
    mask = prompts["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(
        **to_device(blocks.repeat({**prompts, "position_ids": positions}), device),
        use_cache=True,
        logits_to_keep=1,
    )
    sizes = [len(ends) for _, ends in encoded]
    owner = torch.arange(len(encoded)).repeat_interleave(torch.tensor(sizes))
    choices = [torch.tensor(end) for _, ends in encoded for end in ends]
    lengths = torch.tensor([len(choice) for choice in choices])
    scores = torch.empty(num_draws, len(choices))
    # those of similar length together, to pad little
    for group in lengths.argsort(stable=True).split(max(1, batch_size // num_draws)):
        tokens = pad_sequence([choices[i] for i in group], batch_first=True)
        inside = torch.arange(tokens.shape[1]) < lengths[group].unsqueeze(1)
        asked = owner[group]
        # a row for every choice, draw by draw
        rows = (asked + len(encoded) * torch.arange(num_draws).unsqueeze(1)).flatten().to(device)
        chosen = tokens.repeat(num_draws, 1).to(device)
        log_probs = [_log_prob(output.logits[:, -1], rows, chosen[:, 0])]
        if tokens.shape[1] > 1:
            cache = copy.deepcopy(output.past_key_values)
            cache.batch_select_indices(rows)
            following = {
                "input_ids": tokens[:, :-1],
                "attention_mask": torch.cat([mask[asked], inside[:, :-1].long()], dim=1),
                "position_ids": mask.sum(1)[asked].unsqueeze(1) + torch.arange(tokens.shape[1] - 1),
            }
            later = model(
                **to_device(blocks.repeat(following), device),
                past_key_values=cache,
                use_cache=True,
            )
            every = torch.arange(len(rows), device=device)
            log_probs += [
                _log_prob(later.logits[:, t - 1], every, chosen[:, t])
                for t in range(1, chosen.shape[1])
            ]
        found = blocks.split(torch.stack(log_probs, dim=1)).cpu()
        scores[:, group] = torch.where(inside, found, 0).sum(-1) / lengths[group]
    return list(scores.split(sizes, dim=1))


def _log_prob(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of a token under each of some rows of logits (n, V)."""
    logits = require_finite(logits).float()
    return logits[rows, tokens] - logits.logsumexp(-1)[rows]
