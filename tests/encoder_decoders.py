"""Tiny models with an encoder and a decoder, whose answers depend on what is asked."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from helpers import adapt, stir
from language_models import word_tokenizer

SOURCE_POSITIONS = 6
"""Of the tiny Whisper's encoder, each of two frames."""
PROJECTIONS = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"], "whisper": ["q_proj", "v_proj"]}


def tiny_seq2seq(architecture: str) -> PreTrainedModel:
    """A model of width 32 over the vocabulary of `word_tokenizer`."""
    torch.manual_seed(0)
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    layers = {"encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    no_dropout = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    both = layers | heads | widths | no_dropout | {"init_std": 0.3, "vocab_size": 64}
    if architecture == "t5":
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
        config = T5Config(
            **sizes,
            num_heads=4,
            dropout_rate=0.0,
            initializer_factor=1.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
        return T5ForConditionalGeneration(config)
    if architecture == "bart":
        bart = BartConfig(
            **both,
            **ids,
            max_position_embeddings=32,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
        return BartForConditionalGeneration(bart)
    whisper = WhisperConfig(
        **both,
        **ids,
        num_mel_bins=8,
        max_source_positions=SOURCE_POSITIONS,
        max_target_positions=32,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(whisper)


def adapted_seq2seq(architecture: str, method: str = "bara", **options: Any) -> Any:
    """The model with an adapter on its attention, moved away from where it starts."""
    options = {"target_modules": PROJECTIONS[architecture]} | options
    if architecture != "whisper":  # whose inputs PEFT's class for the task does not know
        options = {"task_type": "SEQ_2_SEQ_LM"} | options
    return stir(adapt(tiny_seq2seq(architecture), method, **options)).eval()


def ending_tokenizer() -> Any:
    """`word_tokenizer`, which ends every text as the tokenisers of T5 and BART do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return tokenizer


def features(count: int, seed: int = 0) -> torch.Tensor:
    """Spectrograms for the tiny Whisper, (count, bins, frames)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, 2 * SOURCE_POSITIONS, generator=generator)
