"""Prompts of language models: from texts and conversations to left-padded token ids."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from bara.errors import BaraError
from bara.prediction.outputs import base_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")  # task types of PEFT

POSITIONS = ("max_position_embeddings", "max_target_positions")  # the latter is Whisper's

Prompt = str | Sequence[Mapping[str, Any]]
"""A text to go on from, or a conversation: messages with `role` and `content`."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; a conversation goes through the tokeniser's chat template.

    Raises:
        BaraError: an empty prompt, or a conversation for a tokeniser without a chat template.
    """
    if isinstance(prompt, str):
        ids = token_ids(tokenizer, prompt)
    else:
        text = render_chat(tokenizer, prompt, add_generation_prompt=True)
        ids = token_ids(tokenizer, text, add_special_tokens=False)
    if not ids:
        raise BaraError("A prompt is empty: give at least one token.")
    return ids


def encode_source(tokenizer: PreTrainedTokenizerBase, text: Prompt) -> list[int]:
    """Token ids of a text for an encoder, as the tokeniser begins and ends it.

    Raises:
        BaraError: an empty text, or a conversation.
    """
    if not isinstance(text, str):
        raise BaraError("A model with an encoder takes a text as its prompt, not messages.")
    ids = list(tokenizer(text)["input_ids"]) if text.strip() else []
    if not ids:
        raise BaraError("A prompt is empty: give at least one token.")
    return ids


def token_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a text that goes on: some tokenisers end every text, which is left out."""
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    if not add_special_tokens:
        return ids
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ended = bool(bare) and ids[-len(bare) - 1 :] == [*bare, tokenizer.eos_token_id]
    return ids[:-1] if ended else ids


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Prompt, *, add_generation_prompt: bool = False
) -> str:
    """The text of a conversation.

    Raises:
        BaraError: there is no chat template, or the messages do not fit it.
    """
    if not tokenizer.chat_template:
        raise BaraError(
            "The tokeniser has no chat template, so it cannot take messages: give the prompt as "
            "plain text, or set tokenizer.chat_template."
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except Exception as error:  # jinja's errors and those that templates raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BaraError(f"The messages do not fit the chat template: {reason}") from error


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    completion: str,
    *,
    add_special_tokens: bool = True,
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what follows it.

    The two are tokenised together, because a tokeniser may treat a text's beginning differently;
    on their own where it would merge the prompt's end with the completion ("Answer: " + "four"),
    because generation is given the prompt's own tokens.

    Raises:
        BaraError: nothing is left of one of them.
    """
    start = token_ids(tokenizer, prompt, add_special_tokens=add_special_tokens)
    whole = token_ids(tokenizer, prompt + completion, add_special_tokens=add_special_tokens)
    end = whole[len(start) :]
    if whole[: len(start)] != start:
        end = token_ids(tokenizer, completion, add_special_tokens=False)
    if not start:
        raise BaraError("A prompt is empty: give at least one token.")
    if not end:
        raise BaraError(f"The completion {completion!r} has no tokens.")
    return start, end


def left_padded(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, (n, T), padded on the left.

    Raises:
        BaraError: prompts of unequal length, and no token to pad with.
    """
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    if pad is None and any(len(ids) < longest for ids in prompts):
        raise BaraError(
            "The tokeniser has no pad token, which prompts of unequal length need: set "
            "tokenizer.pad_token = tokenizer.eos_token."
        )
    ids: Tensor = torch.full((len(prompts), longest), pad or 0)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def require_generator(model: nn.Module, purpose: str) -> None:
    """Refuses what does not generate.

    Raises:
        BaraError: it is a classifier or an encoder, or its active adapter was trained as one.
    """
    base, wrapped = base_of(model), cast(Any, model)
    generates = callable(getattr(base, "can_generate", None)) and base.can_generate()
    if not generates:
        raise BaraError(
            f"{purpose} needs a causal language model, and this is a {type(base).__name__}: an "
            "adapter trained for classification cannot generate."
        )
    for name in wrapped.active_adapters if isinstance(wrapped, PeftModel) else ():
        task = wrapped.peft_config[name].task_type
        if task in CLASSIFIERS:
            raise BaraError(
                f"{purpose} needs an adapter of a causal language model, and {name!r} was trained "
                f"for another task, {getattr(task, 'value', task)!s}."
            )


def require_decoder(model: nn.Module, purpose: str) -> None:
    """Refuses what is no causal language model.

    Raises:
        BaraError: as `require_generator`, or the model has an encoder.
    """
    require_generator(model, purpose)
    if is_encoder_decoder(model):
        raise BaraError(
            f"{purpose} needs a decoder-only model, not a {type(base_of(model)).__name__}."
        )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether an encoder reads the prompt and a decoder writes the answer."""
    return bool(getattr(getattr(base_of(model), "config", None), "is_encoder_decoder", False))


def generates(model: nn.Module) -> bool:
    """Whether the model writes texts, of which each next token has a distribution."""
    base = base_of(model)
    return isinstance(base, PreTrainedModel) and bool(base.can_generate())


def context(model: nn.Module) -> int:
    """Most tokens that the model was made for; very many if it does not say."""
    config: Any = model.config
    text = config.get_text_config()
    positions = (getattr(text, name, None) for name in POSITIONS)
    return next(filter(None, positions), sys.maxsize)


def require_room(model: nn.Module, longest: int, new_tokens: int = 0) -> None:
    """Raises BaraError if a prompt with its continuation is longer than the model's context."""
    most = context(model)
    if longest + new_tokens > most:
        more = f" and {new_tokens} new ones" if new_tokens else ""
        raise BaraError(
            f"A prompt of {longest} tokens{more} does not fit the model's context of {most}: "
            "shorten it" + (" or lower max_new_tokens (--max-new-tokens)." if new_tokens else ".")
        )
