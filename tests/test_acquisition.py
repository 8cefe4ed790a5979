"""bara.select and bara.adapter_features against their definitions."""

import math

import pytest
import torch
from torch.distributions import Normal
from torch.nn import functional as F

import bara
from bara import BaraError, ClassificationPredictive, RegressionPredictive
from helpers import adapt, stir


def pool(n=40, draws=5, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(draws, n, classes, generator=generator)
    return ClassificationPredictive(logits.log_softmax(-1))


def entropy(probs):
    return -sum(p * math.log(p) for p in probs)


@pytest.mark.parametrize("by", ["bald", "entropy"])
def test_scores_are_those_of_the_definition(by):
    predictive = pool()
    draws = predictive.log_probs_draws.double().exp().tolist()
    total, mutual = [], []
    for i in range(40):
        rows = [draw[i] for draw in draws]
        total.append(entropy([sum(p) / 5 for p in zip(*rows, strict=True)]))
        mutual.append(total[-1] - sum(map(entropy, rows)) / 5)
    scores = {"bald": mutual, "entropy": total}
    found = bara.select(predictive, 7, by=by)
    for name, expected in scores.items():
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(getattr(found, name), expected, atol=1e-6, rtol=1e-6)
    expected = sorted(range(40), key=lambda i: -scores[by][i])[:7]
    assert found.index.tolist() == expected


def test_scores_of_a_regression_are_those_of_gaussians():
    torch.manual_seed(0)
    predictive = RegressionPredictive(torch.randn(4, 30), torch.rand(4, 30) + 0.1)
    found = bara.select(predictive, 3, by="bald")
    total = Normal(0.0, predictive.variance.double().sqrt()).entropy()
    noise = Normal(0.0, predictive.variance_draws.double().sqrt()).entropy().mean(0)
    torch.testing.assert_close(found.entropy, total)
    torch.testing.assert_close(found.bald, total - noise)
    assert found.index.tolist() == (total - noise).argsort(descending=True)[:3].tolist()


def test_draws_that_disagree_about_the_noise_alone_are_worth_a_label():
    """By the integral: the label tells which of two draws, of equal means, made it."""
    stds = torch.tensor([0.3, 3.0])
    predictive = RegressionPredictive(torch.zeros(2, 1), stds.square().unsqueeze(1))
    y = torch.linspace(-30, 30, 100_001, dtype=torch.float64)
    density = Normal(0.0, stds.double().unsqueeze(1)).log_prob(y).exp().mean(0)
    mutual = torch.trapezoid(torch.special.entr(density), y) - Normal(0.0, stds).entropy().mean()
    assert mutual > 0.4
    # a Gaussian has the largest entropy of all with its variance
    assert bara.select(predictive, 1, by="bald").bald.item() >= mutual


def clusters(copies=10, groups=4):
    """Inputs in groups far from each other; the draws disagree most about the first group."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(groups).repeat_interleave(copies)
    features = 100.0 * F.one_hot(group, groups) + torch.rand(
        len(group), groups, generator=generator
    )
    size = torch.tensor([3.0, 2.0, 1.5, 0.0])[group]  # of the logits, whose sign is the draw's
    logits = torch.stack([torch.stack([s * size, 0 * size], -1) for s in (1.0, -1.0)])
    return group, features, ClassificationPredictive(logits.log_softmax(-1))


def test_a_batch_is_informative_and_spread():
    group, features, predictive = clusters()
    assert set(group[bara.select(predictive, 3, by="bald").index].tolist()) == {0}
    for seed in range(5):
        chosen = bara.select(predictive, 3, by="batch", features=features, seed=seed).index
        assert sorted(group[chosen].tolist()) == [0, 1, 2]  # about the last the draws agree
        spread = bara.select(predictive, 4, by="diversity", features=features, seed=seed).index
        assert sorted(group[spread].tolist()) == [0, 1, 2, 3]


def test_the_seed_decides_and_the_default_is_the_batch():
    _, features, predictive = clusters()
    first, again = (bara.select(predictive, 6, features=features, seed=3).index for _ in "ab")
    assert first.tolist() == again.tolist()
    explicit = bara.select(predictive, 6, by="batch", features=features, seed=3).index
    assert first.tolist() == explicit.tolist()
    others = [bara.select(predictive, 6, features=features, seed=s).index for s in range(4)]
    assert len({tuple(index.tolist()) for index in others}) > 1


@pytest.mark.parametrize("by", ["batch", "diversity"])
def test_copies_are_not_chosen_twice(by):
    predictive = pool()
    features = torch.ones(40, 2)
    chosen = bara.select(predictive, 40, by=by, features=features).index
    assert sorted(chosen.tolist()) == list(range(40))


def test_bad_input_is_one_clear_line():
    predictive = pool()
    for options, match in [
        ({"k": 0}, "between 1 and the 40 inputs"),
        ({"k": 41}, "between 1 and the 40 inputs"),
        ({"k": 3, "by": "best"}, "by must be one of batch, bald, entropy, diversity, not 'best'"),
        ({"k": 3}, r"needs features of the shape \(40, d\)"),
        ({"k": 3, "features": torch.ones(39, 2)}, r"not \(39, 2\)"),
        ({"k": 3, "features": torch.full((40, 2), math.nan)}, "not finite"),
    ]:
        with pytest.raises(BaraError, match=match):
            bara.select(predictive, **options)
    one = pool(draws=1).log_probs_draws
    for same in (one, one.repeat(7, 1, 1)):
        with pytest.raises(BaraError, match="bald needs draws that differ"):
            bara.select(ClassificationPredictive(same), 3, by="bald")
    with pytest.raises(BaraError, match="select is for classification"):
        bara.select(object(), 2)
    silent = RegressionPredictive(torch.randn(2, 5), torch.zeros(2, 5))
    with pytest.raises(BaraError, match="noise variance of 0"):
        bara.select(silent, 2, by="entropy")


def test_features_are_the_masked_means_of_a_x(tiny_bert):
    model = stir(adapt(tiny_bert, target_modules=["query", "value"])).eval()
    layers = {
        name: module for name, module in model.named_modules() if hasattr(module, "lora_posterior")
    }
    rows = [
        {"input_ids": list(range(5, 5 + size)), "attention_mask": [1] * size} for size in (7, 3, 5)
    ]
    features = bara.adapter_features(model, rows, batch_size=2)
    inputs = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, layer in layers.items()
    ]
    for row, found in zip(rows, features, strict=True):
        with torch.no_grad():
            model(input_ids=torch.tensor([row["input_ids"]]))
        parts = []
        for name, layer in layers.items():
            u = (inputs[name][0] @ layer.lora_A["default"].weight.T).mean(0)
            parts.append(u / u.square().mean().sqrt())
        torch.testing.assert_close(found, torch.cat(parts), atol=1e-4, rtol=1e-4)
    for hook in hooks:
        hook.remove()
    assert features.shape == (3, 4 * 4)


def test_features_need_a_bayesian_adapter(tiny_bert):
    with pytest.raises(BaraError, match="Bayesian"):
        bara.adapter_features(tiny_bert, {"input_ids": torch.ones(2, 3).long()})
