"""What a call's arguments tell: rows, padding, labels that count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bara.language.prompts import is_encoder_decoder

MASKS = ("attention_mask", "decoder_attention_mask")


def _is_multiple_choice(given: dict[str, Any]) -> bool:
    ids = given.get("input_ids")
    return isinstance(ids, Tensor) and ids.dim() == 3  # (B, choices, T), flattened by the model


def batch_size_of(given: dict[str, Any]) -> int:
    """Rows of the batch that a model's layers see."""
    if _is_multiple_choice(given):
        return given["input_ids"].shape[0] * given["input_ids"].shape[1]
    names = ("input_ids", "inputs_embeds", "decoder_input_ids")
    inputs = [given.get(name) for name in names]  # positions may be 1 row
    sizes = (v.shape[0] for v in [*inputs, *given.values()] if isinstance(v, Tensor) and v.dim())
    return next(sizes, 1)


def position_weights_of(model: nn.Module, given: dict[str, Any]) -> Iterator[Tensor]:
    """For each padding mask what a position counts in a mean over its row, (B, T).

    A decoder behind an encoder is rarely given a mask: there the labels tell what is padding. A
    mask over sound comes once more as the layers see it, over frames. A layer finds its mask by its
    length, so that the encoder's is taken where both are as long.
    """
    dim = 3 if _is_multiple_choice(given) else 2
    for name in MASKS:
        mask = given.get(name)
        if not isinstance(mask, Tensor):
            continue
        if mask.dim() == dim:
            tokens = mask.flatten(0, -2).bool()
        elif mask.dim() == 4 and mask.shape[-2] == mask.shape[-1]:  # no cache is part of it
            tokens = _tokens(mask)
        else:
            continue
        yield _weights(tokens)
        if name == MASKS[0]:
            yield from map(_weights, _frames(model, tokens))
    labels = given.get("labels")
    if (
        isinstance(labels, Tensor)
        and labels.dim() == 2
        and is_encoder_decoder(model)
        and given.get(MASKS[1]) is None
    ):
        yield _weights(labels.ne(-100))


def _weights(tokens: Tensor) -> Tensor:
    return tokens / tokens.sum(dim=1, keepdim=True).clamp_min(1)


def _frames(model: nn.Module, mask: Tensor) -> Iterator[Tensor]:
    """What a mask (B, T) over the samples of sounds leaves of a speech model's frames, (B, T'), as
    the model itself shortens it; twice where an adapter of its own makes them fewer."""
    if getattr(model, "main_input_name", "input_ids") == "input_ids":
        return
    speech: Any
    for speech in model.modules():  # the model, its encoder, or what prepares the encoder's input
        if hasattr(speech, "_get_feature_vector_attention_mask"):
            break
    else:
        return
    shortens = getattr(speech.config, "add_adapter", False)
    for options in ({"add_adapter": False}, {}) if shortens else ({},):
        samples = torch.tensor(mask.shape[1])
        frames = int(speech._get_feat_extract_output_lengths(samples, **options))
        yield speech._get_feature_vector_attention_mask(frames, mask.long(), **options).bool()


def _tokens(mask: Tensor) -> Tensor:
    """Which positions are tokens, (B, T), by a mask (B, heads, T, T) that is boolean or added to
    the attention's scores: those that see another position or are seen by one."""
    seen = (mask if mask.dtype == torch.bool else mask == 0).any(dim=1)
    seen = seen & ~torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
    return seen.any(dim=1) | seen.any(dim=2)


def loss_items(model: nn.Module, given: dict[str, Any]) -> Tensor | None:
    """Which labels are terms of the loss, by Trainer's rule: boolean, in the shape of the labels,
    for a language model without the first position; None without labels."""
    labels = given.get("shift_labels")
    if not isinstance(labels, Tensor):
        labels = given.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() == 0:
            return None
        if labels.dim() > 1 and predicts_next_token(model):
            labels = labels[..., 1:]
    return labels.ne(-100)


def loss_terms(model: nn.Module, given: dict[str, Any]) -> int:
    """How many terms of one input the model's own loss is the mean of, where it should be the sum.

    The likelihood of several labels is a product over them, that of a span one over its start and
    its end; the losses of transformers divide by their number.
    """
    if isinstance(given.get("start_positions"), Tensor):
        return 2
    labels, config = given.get("labels"), getattr(model, "config", None)
    if not isinstance(labels, Tensor) or labels.dim() != 2 or not labels.is_floating_point():
        return 1
    # before the first loss transformers has not yet concluded the problem from the labels
    known = getattr(config, "problem_type", None) in (None, "multi_label_classification")
    return labels.shape[1] if known and getattr(config, "num_labels", 1) == labels.shape[1] else 1


def share_of(items: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """The part of an accumulated batch's loss terms that a micro-batch has; 1 if unknown.

    Args:
        items: which labels of the micro-batch are terms of the loss, boolean, of any shape.
        num_items_in_batch: such labels in all micro-batches that are accumulated.
    """
    if num_items_in_batch is None:
        return 1.0
    return items.sum() / (num_items_in_batch + (num_items_in_batch == 0))  # 0 of none


def counted(loss: Tensor, share: Tensor | float) -> Tensor:
    """The data loss of a micro-batch, 0 where none of its labels counts: a mean over none is NaN.

    Args:
        loss: mean over the labels of the micro-batch.
        share: `share_of` these.
    """
    return torch.where(share > 0, loss, 0.0) if isinstance(share, Tensor) else loss


def predicts_next_token(model: nn.Module) -> bool:
    """Whether the model's loss shifts its labels, so that the first is no term of it."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    causal = getattr(model, "loss_function", None) is ForCausalLMLoss
    return causal and not is_encoder_decoder(model)
