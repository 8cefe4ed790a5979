"""How good a language model's predictive distribution is, on texts and on answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bara.draws.blocks import Blocks, log_mean_exp
from bara.draws.portions import Portions
from bara.draws.sharing import evaluating
from bara.errors import BaraError
from bara.language.generation import generate
from bara.language.prompts import is_encoder_decoder
from bara.language.tasks import reference, row_prompt
from bara.prediction.batches import Batch, batches, to_device
from bara.prediction.likelihood import require_finite

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
        inputs: what `LanguageTask.inputs` made.
        num_draws, seed, batch_size, progress: as in `bara.predict`; all draws of an input are in
            one pass where the method can do that.

    Returns:
        `nll` in nats per label token, `perplexity`, its exponential, and `accuracy`, the share of
        label tokens that are the most probable one.

    Raises:
        BaraError: empty data, or logits that are not finite.
    """
    draws = Portions(model, num_draws, seed)
    nll, right, tokens = 0.0, 0, 0
    with evaluating(model):
        size = max(1, batch_size // draws.num_draws)
        for batch, _ in batches(inputs, model, size, None, progress):
            found = next_tokens(model, draws, batch, batch_size)
            nll -= float(found.log_probs.gather(1, found.labels.unsqueeze(1)).sum())
            right += int((found.log_probs.argmax(-1) == found.labels).sum())
            tokens += len(found.labels)
    return {"nll": nll / tokens, "perplexity": math.exp(nll / tokens), "accuracy": right / tokens}


class NextTokens(NamedTuple):
    """The mixture's distributions of the next token at the m places of a batch that have a label.

    Attributes:
        log_probs: (m, V), in nats.
        labels: (m,).
        rows: (m,) the input that each place is in.
    """

    log_probs: Tensor
    labels: Tensor
    rows: Tensor


def next_tokens(model: nn.Module, draws: Portions, batch: Batch, batch_size: int) -> NextTokens:
    """What a language model expects, under the mixture over draws, where a batch has labels.

    Args:
        model: causal, or with an encoder; in evaluation mode.
        draws: of it.
        batch: what it is called with, with `labels`, -100 where there is none.
        batch_size: most rows (inputs times draws) in one forward pass.

    Raises:
        BaraError: no labels, or logits that are not finite.
    """
    if not isinstance(batch.get("labels"), Tensor):
        raise BaraError(
            "a language model is measured where its inputs have labels, and these have none: give "
            "input_ids again as labels, with -100 for padding and prompts"
        )
    moved = to_device(batch, next(model.parameters()).device)
    # a decoder behind an encoder makes its own inputs of the labels
    labels = moved["labels"] if is_encoder_decoder(model) else moved.pop("labels")[:, 1:]
    known = labels.ne(-100)

    def run(blocks: Blocks) -> Tensor:
        logits = require_finite(model(**blocks.repeat(moved)).logits)
        here = blocks.split(logits)[:, :, : known.shape[1]][:, known]
        return here.float().log_softmax(-1)

    every = torch.cat(draws.map(run, len(known), batch_size))
    log_probs = log_mean_exp(every)
    return NextTokens(log_probs, labels[known], known.nonzero()[:, 0])


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
    uncertainty = [answer.uncertainty for answer in answers]
    return torch.tensor(uncertainty, dtype=torch.float64), torch.tensor(wrong).double()
