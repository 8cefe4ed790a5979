"""Layers that read tokens first, positions that inputs share, or tokens of several inputs."""

import pytest
import torch
import transformers as hf
from peft import get_peft_model

import bara
from bara import BaraError
from helpers import CONFIGS, stir

SIZE = {"vocab_size": 99, "num_labels": 3, "pad_token_id": 1, "initializer_range": 0.3}
ENCODER = SIZE | {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def longformer():
    options = {"attention_window": [8], "max_position_embeddings": 40}
    config = hf.LongformerConfig(**ENCODER, **options)
    return hf.LongformerForSequenceClassification(config), ["query", "key", "value", "key_global"]


def xlnet():
    config = hf.XLNetConfig(**SIZE, d_model=16, n_layer=1, n_head=2, d_inner=24)
    return hf.XLNetForSequenceClassification(config), ["layer_1", "layer_2", "summary"]


def deberta():
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    config = hf.DebertaV2Config(**ENCODER, **relative, position_buckets=4)
    return hf.DebertaV2ForSequenceClassification(config), [
        "query_proj",
        "key_proj",
        "value_proj",
    ]


def deberta_v1():
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    config = hf.DebertaConfig(**ENCODER, **relative, max_relative_positions=6)
    return hf.DebertaForSequenceClassification(config), ["in_proj", "pos_proj", "pos_q_proj"]


def adapted(make, method):
    torch.manual_seed(0)
    base, targets = make()
    options = {"r": 4, "target_modules": targets, "task_type": "SEQ_CLS", "num_observations": 4}
    return stir(get_peft_model(base, CONFIGS[method](**options)))


def batch(n=4, length=16):
    torch.manual_seed(1)
    ids = torch.randint(2, 99, (n, length))
    mask = torch.ones_like(ids)
    mask[0, length - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(n) % 3}


def one(data, i):
    return {name: value[i : i + 1] for name, value in data.items()}


@pytest.mark.parametrize("method", ["bara", "balora", "blob"])
@pytest.mark.parametrize("make", [longformer, xlnet, deberta, deberta_v1])
def test_inputs_together_have_the_draws_of_inputs_alone(make, method):
    model, data = adapted(make, method).eval(), batch()
    together = bara.predict(model, data, num_draws=3, progress=False).log_probs_draws
    alone = [
        bara.predict(model, one(data, i), num_draws=3, batch_size=1, progress=False)
        for i in range(4)
    ]
    torch.testing.assert_close(
        together, torch.cat([p.log_probs_draws for p in alone], 1), atol=1e-4, rtol=1e-4
    )
    assert together.exp().std(0).amax(-1).min() > 1e-3


@pytest.mark.parametrize("make", [longformer, xlnet, deberta])
def test_ranks_together_are_those_of_inputs_alone(make):
    model, data = adapted(make, "bara").eval(), batch()
    together = bara.effective_rank(model, data, progress=False)
    alone = [bara.effective_rank(model, one(data, i), progress=False) for i in range(4)]
    torch.testing.assert_close(together.soft, torch.cat([rank.soft for rank in alone], 1))


@pytest.mark.parametrize("method", ["bara", "balora"])
@pytest.mark.parametrize("make", [longformer, deberta])
def test_they_train(make, method):
    model = adapted(make, method).train()
    model(**batch()).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in trained.values())
    assert any(name.endswith("lora_A.default.weight") for name in trained)


def test_experts_that_read_tokens_of_several_inputs_are_refused():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_experts": 2}
    more = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_sparse_step": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 40}
    settings = hf.NllbMoeConfig(**sizes, **more, **heads)
    config = bara.BaraConfig(r=4, target_modules="all-linear")
    with pytest.raises(BaraError, match=r"experts.*exclude_modules"):
        get_peft_model(hf.NllbMoeForConditionalGeneration(settings), config)
    without = bara.BaraConfig(r=4, target_modules="all-linear", exclude_modules=".*experts.*")
    get_peft_model(hf.NllbMoeForConditionalGeneration(settings), without)
