"""Tiny causal language models of several architectures, and a tokeniser for them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bara.draws.draws import attach_draws
from bara.methods.ensemble import EnsembleDraws, member_name
from helpers import SIZES, adapt, stir, tiny_gpt2, tiny_llama

DECODER = SIZES | {"bos_token_id": 1, "eos_token_id": 2}


def tiny_lm(architecture: str) -> PreTrainedModel:
    """A decoder with random weights, large enough that its answers depend on the prompt."""
    torch.manual_seed(0)
    wide: dict[str, Any] = {"initializer_range": 0.3}
    match architecture:
        case "llama":
            return tiny_llama(eos_token_id=2, **wide)
        case "llama-tied":
            return tiny_llama(eos_token_id=2, tie_word_embeddings=True, **wide)
        case "gpt2":
            return tiny_gpt2()
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**DECODER, **wide))
        case "mistral":  # a window shorter than the prompts of the tests
            return MistralForCausalLM(MistralConfig(**DECODER, **wide, sliding_window=4))
        case "mixtral":
            config = MixtralConfig(**DECODER, **wide, num_local_experts=4, num_experts_per_tok=2)
            return MixtralForCausalLM(config)
    raise ValueError(architecture)


def adapted_lm(architecture: str = "llama", method: str = "bara", **options: Any) -> Any:
    """The model with an adapter on its attention, moved away from where it starts."""
    names = ["c_attn"] if architecture == "gpt2" else ["q_proj", "v_proj"]
    options = {"target_modules": names, "task_type": "CAUSAL_LM"} | options
    return stir(adapt(tiny_lm(architecture), method, **options)).eval()


def word_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A token per word: w3 ... w63, and padding, beginning and end."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(*numbers: int) -> str:
    """A text whose token ids are these."""
    return " ".join(f"w{number}" for number in numbers)


def lora_ensemble(num_members: int) -> Any:
    """Plain LoRA members on one tiny model, each moved away from B = 0 in its own way."""
    model = get_peft_model(tiny_lm("llama"), LoraConfig(r=2, target_modules="all-linear"))
    for index in range(1, num_members):
        model.add_adapter(member_name(index), model.peft_config["default"])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    attach_draws(model, EnsembleDraws(model, num_members))
    return model.eval()
