"""What a model that generates is given: token ids of prompts, or what a processor made for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bara.errors import BaraError
from bara.language.prompts import (
    Prompt,
    encode_prompt,
    encode_source,
    is_encoder_decoder,
    left_padded,
    require_room,
)
from bara.prediction.batches import num_rows, pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompts = str | Sequence[Prompt] | Mapping[str, Tensor]
"""Texts or conversations; or for an encoder that reads no text, what its processor made."""


@dataclass(frozen=True)
class Inputs:
    """Prompts as a model reads them.

    Attributes:
        prompts: what was asked; of a processor's tensors the number of the row, from 1.
        rows: for each prompt its token ids, or its row of the tensors.
        stack: makes a batch of some rows.
        longest: most tokens that stand before an answer, which follows the prompt; the decoder
            behind an encoder has its start token there.
    """

    prompts: Sequence[Prompt]
    rows: Sequence[Any]
    stack: Callable[[Sequence[Any]], dict[str, Any]]
    longest: int

    def part(self, rows: slice) -> Inputs:
        """Some of the prompts."""
        return replace(self, prompts=self.prompts[rows], rows=self.rows[rows])

    def batch(self, times: int = 1) -> dict[str, Any]:
        """All rows, one behind the other, as often as asked."""
        return self.stack([*self.rows] * times)


def read_prompts(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Prompts) -> Inputs:
    """Prompts as the model reads them: padded on the left for a decoder, on the right for an
    encoder.

    Raises:
        BaraError: there is none, one is empty or too long, or is of a kind that the model does not
            take.
    """
    encoder = is_encoder_decoder(model)
    if isinstance(prompts, Mapping):
        if not encoder:
            raise BaraError(
                "Tensors in place of prompts are for models with an encoder, such as Whisper: give "
                "texts or conversations."
            )
        tensors = {name: v for name, v in prompts.items() if isinstance(v, Tensor) and v.dim()}
        count = num_rows(tensors)
        rows: list[Any] = [{k: v[i : i + 1] for k, v in tensors.items()} for i in range(count)]
        names = [f"input {i}" for i in range(1, count + 1)]
        return Inputs(names, rows, _joined, 1)
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise BaraError("There is no prompt: give at least one.")
    encode = encode_source if encoder else encode_prompt
    ids = [encode(tokenizer, prompt) for prompt in given]
    longest = max(map(len, ids))
    if not encoder:
        return Inputs(given, ids, partial(left_padded, tokenizer), longest)
    require_room(model, longest)
    return Inputs(given, ids, partial(_right_padded, tokenizer), 1)


def _right_padded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]]) -> dict[str, Any]:
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    return pad_rows(rows, tokenizer.pad_token_id or 0)


def _joined(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
