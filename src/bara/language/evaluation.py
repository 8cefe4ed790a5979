"""How good a language model's predictive distribution is, on texts and on answers."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bara.draws.draws import Draws, draw_source
from bara.errors import BaraError
from bara.language.generation import generate
from bara.language.tasks import reference, row_prompt
from bara.prediction.batches import batches, repeat_rows, to_device

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def token_metrics(
    model: nn.Module,
    inputs: Dataset,
    *,
    num_draws: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool | None = None,
) -> dict[str, float]:
    """The likelihood of a table's labels under the mixture over draws, token by token.

    Args:
        inputs: what `bara.language.tasks.tokenise_language` made.
        num_draws, seed, batch_size, progress: as in `bara.predict`; all draws of an input are in
            one pass where the method can do that.

    Returns:
        `nll` in nats per label token, `perplexity`, its exponential, and `accuracy`, the share of
        label tokens that are the most probable one.

    Raises:
        BaraError: empty data, or logits that are not finite.
    """
    source = draw_source(model)
    count = source.num_draws(num_draws) if source else 1
    at_once = count if source is None or source.batched else 1
    portions = [Draws(at_once, seed, first) for first in range(0, count, at_once)]
    device = next(model.parameters()).device
    nll, right, tokens = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        for batch, _ in batches(inputs, model, max(1, batch_size // at_once), None, progress):
            labels = batch.pop("labels")[:, 1:].to(device)
            known = labels.ne(-100)
            moved = to_device(repeat_rows(batch, at_once), device)
            parts = []
            for draws in portions:
                with torch.no_grad(), source.drawing(draws) if source else nullcontext():
                    parts.append(model(**moved).logits.unflatten(0, (at_once, -1)))
            logits = torch.cat(parts)
            if not torch.isfinite(logits).all():
                raise BaraError(
                    "The model's logits are not finite: the adapter was damaged or training "
                    "diverged."
                )
            logits = logits[:, :, :-1][:, known]  # (S, labels, V)
            log_probs = logits.float().log_softmax(-1).logsumexp(0) - math.log(count)
            target = labels[known]
            nll -= float(log_probs.gather(1, target.unsqueeze(1)).sum())
            right += int((log_probs.argmax(-1) == target).sum())
            tokens += len(target)
    finally:
        model.train(was_training)
    return {"nll": nll / tokens, "perplexity": math.exp(nll / tokens), "accuracy": right / tokens}


def answer_losses(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, table: Dataset, **options: Any
) -> tuple[Tensor, Tensor]:
    """Uncertainty and loss of generated answers, for `bara.calibrate_threshold`: (n,) each.

    Answers are decoded as `bara.generate` decodes them under the same options.

    The loss is 1 where the answer is not the reference, whose words it has to repeat; case and
    spaces do not count.

    Args:
        table: rows with `prompt` and `completion`, or `messages` that end with the assistant's.
        options: those of `bara.generate`.

    Raises:
        BaraError: a row has no reference, or any error of `bara.generate`.
    """
    rows: list[Any] = list(table)
    references = [reference(row, f"row {i}") for i, row in enumerate(rows, start=1)]
    prompts = [row_prompt(row, f"row {i}") for i, row in enumerate(rows, start=1)]
    answers = generate(model, tokenizer, prompts, agreement=False, **options)
    wrong = [
        answer.text.casefold().split() != right.casefold().split()
        for answer, right in zip(answers, references, strict=True)
    ]
    return torch.tensor([answer.uncertainty for answer in answers]), torch.tensor(wrong).double()
