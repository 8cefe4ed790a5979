"""The Laplace approximation against an explicitly computed Gauss-Newton matrix."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call, jacrev
from transformers import BertForSequenceClassification

import bara
from bara.methods import LaplaceOptions, WeightDraws
from conftest import tiny_bert_config
from helpers import adapt

pytest.importorskip("laplace")

from bara.methods import laplace


def classifier(layers=1):
    torch.manual_seed(0)
    config = tiny_bert_config(num_labels=3, pad_token_id=0)
    config.num_hidden_layers = layers
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = get_peft_model(BertForSequenceClassification(config), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return model.eval()


def rows(n):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 20, (n, 6), generator=generator)
    return [
        {"input_ids": i.tolist(), "attention_mask": [1] * 6, "labels": k % 3}
        for k, i in enumerate(ids)
    ]


def jacobians(model, names, data):
    """d logits / d weights, (n, 3, weights), and the softmax's Hessian, (n, 3, 3)."""
    ids = torch.tensor([row["input_ids"] for row in data])
    weights = {n: p.detach() for n, p in model.named_parameters() if n in names}

    def logits(weights):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional_call(model, weights, (), {"input_ids": ids})["logits"]

    jacobian = jacrev(logits)(weights)
    jacobian = torch.cat([jacobian[n].flatten(2) for n in weights], dim=2)
    p = logits(weights).softmax(-1)
    return jacobian, torch.diag_embed(p) - torch.einsum("ni,nj->nij", p, p)


def names_of(model, part):
    return [name for name, _ in model.named_parameters() if part in name]


@pytest.mark.parametrize("subset", ["adapter", "last-layer"])
def test_the_diagonal_is_that_of_the_gauss_newton_matrix(subset):
    model, data = classifier(), rows(7)
    options = LaplaceOptions(subset, "diag", prior_precision=0.5)
    assert laplace(model, data, options, batch_size=3) == pytest.approx(0.5)
    names = names_of(model, "lora_" if subset == "adapter" else "modules_to_save")
    j, hessian = jacobians(model, names, data)
    diagonal = torch.einsum("ncw,ncd,ndw->w", j, hessian, j)
    factors = model.__dict__["bara_draws"].factors
    assert list(factors) == names
    variance = torch.cat([factors[n].scale.flatten().square() for n in names])
    torch.testing.assert_close(variance, 1 / (diagonal + 0.5), rtol=1e-3, atol=1e-5)


def test_kronecker_factors_are_exact_for_one_example():
    """The head sees one vector per text: with one text its block is a Kronecker product."""
    model, data = classifier(), rows(1)
    laplace(model, data, LaplaceOptions("last-layer", "kron", prior_precision=0.5))
    name = next(n for n in names_of(model, "modules_to_save") if n.endswith("weight"))
    j, hessian = jacobians(model, [name], data)
    precision = torch.einsum("ncv,ncd,ndw->vw", j, hessian, j) + 0.5 * torch.eye(j.shape[2])
    f = model.__dict__["bara_draws"].factors[name]
    q = torch.kron(f.left, f.right)
    covariance = q @ torch.diag(f.scale.flatten().square()) @ q.T
    torch.testing.assert_close(covariance, precision.inverse(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_draws_of_the_adapter_are_linearised(structure):
    """Every draw is logits(mean) + J (draw - mean), with J by reverse-mode differentiation.

    The draws are in pairs with opposite noise.
    """
    model, data = classifier(layers=2), rows(4)
    laplace(model, data, LaplaceOptions("adapter", structure, prior_precision=0.2))
    source = model.__dict__["bara_draws"]
    names = names_of(model, "lora_")
    j, _ = jacobians(model, names, data)
    predicted = bara.predict(model, data, num_draws=3, seed=4, batch_size=2)
    mean = bara.predict(model, data, deterministic=True).log_probs_draws[0]
    with pytest.raises(bara.BaraError, match="one draw at a time"), bara.sampling(model, 2):
        pass
    for d in range(3):
        draws = bara.draws.draws.Draws(1, seed=4, first=d // 2)
        delta = []
        for name in names:
            parameter = source.parameters[name]
            eps = draws.numbers(name, "normal", tuple(parameter.shape), parameter.device)[0]
            f = source.factors[name]
            noise = f.scale * eps
            if structure == "kron":
                noise = f.left @ noise @ f.right.T
            delta.append(noise.flatten())
        expected = (mean + (-1) ** d * j @ torch.cat(delta)).log_softmax(-1)
        torch.testing.assert_close(predicted.log_probs_draws[d], expected, atol=2e-3, rtol=1e-3)


def test_the_prior_precision_maximises_the_marginal_likelihood():
    """log Z(t) = const - t |w|^2 / 2 + k log(t) / 2 - log det(H + t) / 2 for a diagonal H."""
    data = rows(12)
    model = classifier()
    fitted = laplace(model, data, LaplaceOptions("last-layer", "diag"))
    names = names_of(model, "modules_to_save")
    j, hessian = jacobians(model, names, data)
    h = torch.einsum("ncw,ncd,ndw->w", j, hessian, j).double()
    squared = sum(p.double().square().sum() for n, p in model.named_parameters() if n in names)

    def evidence(t):
        return 0.5 * (len(h) * torch.log(t) - t * squared - torch.log(h + t).sum())

    grid = torch.logspace(-3, 4, 2000, dtype=torch.float64)
    best = max(grid, key=lambda t: float(evidence(t)))
    assert float(evidence(torch.tensor(fitted).double())) >= float(evidence(best)) - 0.5


def test_the_fit_tells_the_time_left(terminal):
    laplace(classifier(), rows(7), LaplaceOptions("last-layer", "diag"), batch_size=3)
    shown = terminal()
    assert re.search(r"Hessian\]: 100%.* 3/3 \[00:\d\d<00:00", shown)
    assert "marginal likelihood]: 100%" in shown


def test_saved_noise_keeps_its_kind(tmp_path):
    model, data = classifier(), rows(4)
    laplace(model, data, LaplaceOptions("adapter", "kron", 1.0))
    model.__dict__["bara_draws"].save(tmp_path)
    other = classifier()
    loaded = WeightDraws.load(other, tmp_path)
    assert loaded.linearised
    before = bara.predict(model, data, num_draws=2).log_probs_draws
    bara.draws.draws.attach_draws(other, loaded)
    after = bara.predict(other, data, num_draws=2).log_probs_draws
    torch.testing.assert_close(before, after)


def test_refusals(tiny_bert):
    with pytest.raises(bara.BaraError, match="subset must be one of adapter, last-layer"):
        LaplaceOptions(subset="all")
    with pytest.raises(bara.BaraError, match="prior_precision must be > 0"):
        LaplaceOptions(prior_precision=0.0)
    with pytest.raises(bara.BaraError, match="no LoRA adapter"):
        laplace(tiny_bert, rows(2))
    with pytest.raises(bara.BaraError, match="posterior already"):
        laplace(adapt(tiny_bert, "bara", task_type="SEQ_CLS"), rows(2))
    model = classifier()
    model.config.problem_type = "regression"
    with pytest.raises(bara.BaraError, match="classification only"):
        laplace(model, rows(2))
