"""Gates and noise under optimisers and learning rates that are not the usual ones."""

import pytest
import torch
from transformers import BertForSequenceClassification

import bara
from conftest import VOCABULARY, tiny_bert_config
from helpers import CONFIGS, adapt, layer_posterior

IDS = torch.randint(5, len(VOCABULARY), (64, 8), generator=torch.Generator().manual_seed(0))
LABELS = (IDS[:, 0] + IDS[:, 3]) % 3


def classifier(method, seed=0):
    torch.manual_seed(seed)
    base = BertForSequenceClassification(tiny_bert_config(num_labels=3, initializer_range=0.2))
    options = {"r": 8, "lora_alpha": 16, "task_type": "SEQ_CLS", "num_observations": 64}
    targets = ["query", "key", "value"]
    return adapt(base, method, seed, target_modules=targets, **options).train()


def train(model, optimiser, steps, total):
    """Trains for some steps of `total`; the effective ranks and the last loss."""
    ranks = []
    for step in range(steps):
        bara.set_progress(model, step / total, total)
        rows = torch.randint(0, len(IDS), (16,))
        loss = model(input_ids=IDS[rows], labels=LABELS[rows]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ranks.append(bara.kl_terms(model).get("effective_rank"))
    return ranks, loss.item()


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("method", [m for m in CONFIGS if m != "mc-dropout"])
@pytest.mark.parametrize("rate", [1e-3, 1e-1])
def test_plain_gradient_descent_stays_finite_and_closes_no_gate(method, rate):
    model = classifier(method)
    ranks, loss = train(model, torch.optim.SGD(parameters(model), rate), 40, 40)
    assert all(p.isfinite().all() for p in parameters(model))
    assert loss < 1e6
    if method == "bara":
        assert min(ranks) > 7


@pytest.mark.parametrize("seed", range(3))
def test_gates_stay_open_until_the_kl_has_weight_whatever_the_rate(seed):
    model = classifier("bara", seed)
    optimiser = torch.optim.AdamW(parameters(model), 1e-2, weight_decay=0.0)
    ranks, _ = train(model, optimiser, 20, 100)  # the KL's weight begins to rise after 20 steps
    assert min(ranks) == pytest.approx(max(ranks), rel=1e-2)
    assert min(ranks) > 7
    bara.set_progress(model, 0.5, 100)
    model(input_ids=IDS, labels=LABELS).loss.backward()
    _, posterior = layer_posterior(model)
    assert posterior.global_logit.grad.abs().min() > 0
