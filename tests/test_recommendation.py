"""bara.recommend_ranks: PEFT makes of it the adapter that it promises."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer

import bara
from bara import BaraError, EffectiveRank
from bara.adapter.layer import adapted_layers
from helpers import adapt, layer_posterior

TARGETS = ["query", "dense"]


def measured(model, means, rank=4):
    """An effective rank with these means of the layers, over two inputs that differ."""
    layers = tuple(name for name, _, _ in adapted_layers(model, "default"))
    spread = torch.tensor([-0.1, 0.1])
    soft = torch.tensor([means[i % len(means)] for i in range(len(layers))]).unsqueeze(1) + spread
    return EffectiveRank(layers, (rank,) * len(layers), soft, soft.round())


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_makes_the_recommended_adapter(tiny_bert, rslora):
    plain = copy.deepcopy(tiny_bert)
    model = adapt(tiny_bert, target_modules=TARGETS, use_rslora=rslora)
    rank = measured(model, [0.3, 1.0, 1.2, 3.8])
    found = bara.recommend_ranks(model, rank)
    wanted = dict(zip(rank.layers, [1, 1, 2, 4] * 3, strict=False))
    scaling = layer_posterior(model)[0].scaling["default"]
    options = found.config_options()
    lora = get_peft_model(plain, LoraConfig(**options, target_modules=TARGETS, use_rslora=rslora))
    layers = {n: m for n, m in lora.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert {name: layer.r["default"] for name, layer in layers.items()} == wanted
    for layer in layers.values():
        assert layer.scaling["default"] == pytest.approx(scaling)
    assert sum(p.numel() for n, p in lora.named_parameters() if "lora_" in n) == found.parameters
    full = sum(p.numel() for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n)
    assert full == found.full_parameters
    assert found.saved == pytest.approx(1 - found.parameters / full)
    assert f"{found.parameters:,} parameters instead of {full:,}" in str(found)


def test_a_mean_that_rounding_put_above_a_whole_number_is_that_number(tiny_bert):
    model = adapt(tiny_bert, target_modules=TARGETS)
    assert bara.recommend_ranks(model, measured(model, [2.00001])).r == 2


def test_bad_input_is_one_clear_line(tiny_bert):
    plain = copy.deepcopy(tiny_bert)
    model = adapt(tiny_bert, target_modules=TARGETS)
    with pytest.raises(BaraError, match="the layers differ"):
        bara.recommend_ranks(model, EffectiveRank(("a",), (4,), torch.ones(1, 2), torch.ones(1, 2)))
    with pytest.raises(BaraError, match="nothing to recommend"):
        bara.recommend_ranks(model, measured(model, [3.5]))
    with pytest.raises(BaraError, match="needs a PEFT model"):
        bara.recommend_ranks(plain, measured(model, [1.0]))
    blob = adapt(plain, "blob", target_modules=TARGETS)
    inputs = {"input_ids": torch.ones(2, 3).long()}
    with pytest.raises(BaraError, match="its method has no gates"):
        bara.recommend_ranks(blob, bara.effective_rank(blob, inputs))
