"""The forward passes of all families against explicitly written weights and draws."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

import bara
from bara.adapter.layer import adapted_layers
from helpers import (
    CONFIGS,
    QUICK,
    TinyConv,
    TinyNet,
    adapt,
    balora_network,
    granular,
    layer_posterior,
    stir,
    tiny_gpt2,
    tiny_llama,
)

METHODS = list(CONFIGS)


def net(method="bara", **options):
    torch.manual_seed(0)
    return stir(adapt(TinyNet(), method, target_modules=["layer"], **options))


def gate_mean(logit):
    v = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    shift = 0.66 * torch.log((v + 0.1) / (1.1 - v))
    return torch.sigmoid(logit.double().unsqueeze(-1) - shift).mean(-1).float()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_model_is_the_base_model_at_the_start(method, make):
    base = make().eval()
    ids = torch.randint(1, 64, (6, 9), generator=torch.Generator().manual_seed(0))
    expected = base(input_ids=ids).logits
    model = adapt(base, method).eval()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=0, rtol=0)
    with bara.sampling(model, num_draws=3, seed=0):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=0, rtol=0)
    model.train()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-6, rtol=0)


def test_bara_mean_is_lora_with_expected_gates():
    model = net("bara").eval()
    layer, posterior = layer_posterior(model)
    x = torch.randn(5, 6)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    u = x @ a.T
    h = u / u.square().mean(-1, keepdim=True).sqrt()
    local = 100 * (h @ posterior.gate_weight.T / 2 + posterior.gate_bias)
    m = gate_mean(100 * posterior.global_logit) * gate_mean(local)
    expected = layer.base_layer(x) + 2.0 * (m * u) @ b.T
    torch.testing.assert_close(model(x=x)["logits"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"local_gate": False}, {"weight_noise": 0}])
def test_bara_draws_are_the_explicit_weights(options):
    """A draw equals LoRA with A's noise on its output and B's columns scaled, by hand."""
    model = net("bara", **options).eval()
    layer, posterior = layer_posterior(model)
    x = torch.randn(4, 6)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    u = x @ a.T
    h = u / u.square().mean(-1, keepdim=True).sqrt()

    def gate(logit, uniform):
        noise = uniform.log() - (1 - uniform).log()
        return (torch.sigmoid((logit + noise) / 0.66) * 1.2 - 0.1).clip(0, 1)

    with bara.sampling(model, num_draws=2, seed=5) as draws:
        logits = model(x=x.repeat(2, 1))["logits"].view(2, 4, -1)

    def numbers(name, kind):
        return draws.numbers(f"layer/{name}", kind, (4,), torch.device("cpu"))

    for d in range(2):
        noisy = u
        if c := posterior.resolved.weight_noise:
            std = torch.stack([(c * (a * row).square().sum(1)).sqrt() for row in x])
            noisy = u + std * numbers("A", "normal")[d]
        m = gate(100 * posterior.global_logit, numbers("z", "uniform")[d])
        m = m * (1 + (100 * posterior.noise_logit).exp().sqrt() * numbers("eps", "normal")[d])
        if posterior.config.local_gate:
            local = 100 * (h @ posterior.gate_weight.T / 2 + posterior.gate_bias)
            m = m * gate(local, numbers("g", "uniform")[d])
        for i in range(4):
            row = m[i] if m.dim() > 1 else m
            expected = layer.base_layer(x[i]) + 2.0 * (b * row) @ noisy[i]
            torch.testing.assert_close(logits[d, i], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_mode_is_the_average_of_many_draws(method):
    """Exact for one layer, whose output is linear in the multipliers."""
    model = net(method).eval()
    x = torch.randn(3, 6)
    with torch.no_grad():
        mean = model(x=x)["logits"]
        with bara.sampling(model, num_draws=20_000, seed=1):
            draws = model(x=x.repeat(20_000, 1))["logits"].view(20_000, 3, -1)
    error = 5 * draws.std(0) / 20_000**0.5 + 1e-5
    assert ((draws.mean(0) - mean).abs() < error).all()


class SharedInput(torch.nn.Module):
    """Two layers that read the same tensor, which may change in place in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 5)
        self.layer2 = torch.nn.Linear(6, 5)
        self.in_place = True

    def forward(self, x, labels=None):
        first = self.layer(x)
        x = x.mul_(3) if self.in_place else x * 3
        return {"logits": first + self.layer2(x)}


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_an_input_that_changes_in_place_has_its_own_noise(guard):
    model = stir(adapt(SharedInput(), "bara", target_modules=["layer", "layer2"])).eval()
    logits = []
    for in_place in (True, False):
        model.get_base_model().in_place = in_place
        torch.manual_seed(0)
        with guard(), bara.sampling(model, seed=0):
            logits.append(model(x=torch.randn(4, 6))["logits"])
    torch.testing.assert_close(*logits)


WEIGHT_NOISE_ONLY = {"global_gate": False, "local_gate": False, "factor_noise": False}


def test_noise_on_a_alone_merges_as_plain_lora():
    model = net("bara", **WEIGHT_NOISE_ONLY).eval()
    layer, posterior = layer_posterior(model)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    expected = layer.base_layer.weight + 2.0 * b @ a
    assert (posterior.inclusion() == 1).all()
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, expected)


@pytest.mark.parametrize("method", ["balora", "bara"])
def test_rank_space_noise_has_the_moments_of_sampled_weights(method):
    """Mean and covariance of the output against explicit draws of A ~ N(theta, alpha theta^2)."""
    options = {"weight_noise": 0.7, **WEIGHT_NOISE_ONLY} if method == "bara" else {}
    model = net(method, **options).eval()
    layer, posterior = layer_posterior(model)
    x = torch.randn(1, 6)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    u = x @ a.T
    h = u / u.square().mean(-1, keepdim=True).sqrt()
    if method == "bara":
        alpha = torch.tensor(0.7)
    else:
        alpha = (torch.nn.functional.softplus(10 * balora_network(posterior, h)) + 1e-6).detach()
    torch.manual_seed(0)
    draws = 40_000
    weights = a + alpha.sqrt() * a.abs() * torch.randn(draws, *a.shape)
    explicit = torch.einsum("ok,dki,i->do", b, weights, x[0]) * 2.0 + layer.base_layer(x)[0]
    with torch.no_grad(), bara.sampling(model, num_draws=draws, seed=3):
        sampled = model(x=x.repeat(draws, 1))["logits"]
    scale = explicit.std(0)
    assert ((sampled.mean(0) - explicit.mean(0)).abs() < 6 * scale / draws**0.5).all()
    bound = 6 * torch.outer(scale, scale) * (2 / draws) ** 0.5
    assert ((torch.cov(sampled.T) - torch.cov(explicit.T)).abs() < bound).all()


def test_bara_kl_is_the_sum_of_its_parts():
    model = net("bara", global_prior=0.4, local_prior=0.2, noise_prior=0.5, prior_std=0.2)
    layer, posterior = layer_posterior(model)
    x = torch.randn(7, 6)
    model.train()
    model(x=x)
    terms = bara.kl_terms(model)
    with torch.no_grad():
        shift = 0.66 * math.log(0.1 / 1.1)
        z = torch.sigmoid(100 * posterior.global_logit - shift)
        u = x @ layer.lora_A["default"].weight.T
        h = u / u.square().mean(-1, keepdim=True).sqrt()
        g = torch.sigmoid(100 * (h @ posterior.gate_weight.T / 2 + posterior.gate_bias) - shift)
        alpha = (100 * posterior.noise_logit).exp()
        noise = 0.5 * ((alpha + 1) / 0.5 - 1 - torch.log(alpha / 0.5))
        columns = layer.lora_B["default"].weight.square().sum(0) / (2 * 0.2**2)
        gates = kl_divergence(Bernoulli(z.double()), Bernoulli(torch.tensor(0.4).double()))
        global_kl = gates.sum() + (z * (noise + columns)).sum()
        local = kl_divergence(Bernoulli(g.double()), Bernoulli(torch.tensor(0.2).double()))
        local_kl = (local * z).sum(-1).mean()
    assert terms["kl_global"] == pytest.approx(global_kl.item(), rel=1e-4)
    assert terms["kl_local"] == pytest.approx(local_kl.item(), rel=1e-4)
    assert terms["effective_rank"] == pytest.approx((z * g).sum(-1).mean().item(), rel=1e-4)


def test_bara_kl_of_layers_of_several_ranks_is_the_sum_of_theirs():
    pattern = {"q_proj": 2}
    model = adapt(tiny_llama(), r=4, rank_pattern=pattern, global_prior=0.4)
    stir(model).train()
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    spaces = {}
    with bara.adapter.elbo.Elbo.of(model).observing(
        lambda name, _, space: spaces.update({name: space})
    ):
        model(input_ids=ids)
    terms = bara.kl_terms(model)
    layers = list(adapted_layers(model, "default"))
    assert {layer.r["default"] for _, layer, _ in layers} == {2, 4}
    global_kl, local_kl, ranks = [], [], []
    with torch.no_grad():
        for name, layer, posterior in layers:
            z = posterior.inclusion()
            g = posterior.open_probability(spaces[name]) / z
            gates = kl_divergence(Bernoulli(z), Bernoulli(torch.tensor(0.4))).sum()
            alpha = torch.exp(100 * posterior.noise_logit)
            noise = kl_divergence(Normal(1.0, alpha.sqrt()), Normal(0.0, 1.0))
            b = layer.lora_B["default"].weight
            columns = b.square().sum(0) / (2 * posterior.config.prior_std**2)
            global_kl.append(gates + (z * (noise + columns)).sum())
            local = kl_divergence(Bernoulli(g), Bernoulli(torch.tensor(0.25)))
            local_kl.append((local * z).sum(-1).mean())
            ranks.append((z * g).sum(-1).mean())
    assert terms["kl_global"] == pytest.approx(sum(global_kl).item(), rel=1e-4)
    assert terms["kl_local"] == pytest.approx(sum(local_kl).item(), rel=1e-3)
    assert terms["effective_rank"] == pytest.approx(sum(ranks).item() / len(ranks), rel=1e-4)


def test_balora_kl_counts_every_element_of_a():
    model = net("balora", dropout_prior=0.2)
    layer, posterior = layer_posterior(model)
    x = torch.randn(7, 6)
    model.train()
    model(x=x)
    with torch.no_grad():
        u = x @ layer.lora_A["default"].weight.T
        h = u / u.square().mean(-1, keepdim=True).sqrt()
        alpha = torch.nn.functional.softplus(10 * balora_network(posterior, h)) + 1e-6
        c = 0.2 / 0.8
        kl = 4 * 6 * 0.5 * ((alpha + 1) / c - 1 - torch.log(alpha / c))
    assert bara.kl_terms(model)["kl_global"] == pytest.approx(kl.mean().item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_the_elbo_match_finite_differences(method):
    options = {"local_kl_weight": 0.1} if method == "bara" else {}
    model = net(method, **options).double().train()
    if method == "balora":  # its features have no gradient by design: make alpha constant in A
        torch.nn.init.zeros_(layer_posterior(model)[1].output_weight)
    x, y = torch.randn(3, 6).double().requires_grad_(), torch.randn(3, 5).double()

    def loss():
        with bara.sampling(model, seed=0):  # fixed noise
            return model(x=x, labels=y)["loss"]

    loss().backward()
    for name, parameter in [*model.named_parameters(), ("the input", x)]:
        if not parameter.requires_grad:
            continue
        flat = parameter.data.view(-1)
        index = flat.numel() // 2
        step, before = 1e-5, flat[index].item()
        values = []
        for sign in (1, -1):
            flat[index] = before + sign * step
            values.append(loss().item())
        flat[index] = before
        numeric = (values[0] - values[1]) / (2 * step)
        gradient = parameter.grad.view(-1)[index].item()
        if name.endswith(QUICK):  # steps as if the logit were the parameter
            numeric /= 100**2
        assert gradient == pytest.approx(numeric, rel=1e-4, abs=1e-8), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_padding_and_company_do_not_change_an_input(tiny_bert, method, side, granularity):
    model = adapt(tiny_bert, method, **granular(method, granularity), task_type="SEQ_CLS")
    stir(model, 0.2).eval()
    ids = torch.randint(5, 20, (1, 6), generator=torch.Generator().manual_seed(0))
    other = torch.randint(5, 20, (1, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 10, dtype=torch.long)
    padded = torch.zeros(1, 4, dtype=torch.long)
    position = torch.arange(10).repeat(2, 1)
    if side == "right":
        batch = torch.cat([torch.cat([ids, padded], 1), other])
        mask[0, 6:] = 0
    else:
        batch = torch.cat([torch.cat([padded, ids], 1), other])
        mask[0, :4] = 0
        position[0] = (torch.arange(10) - 4).clamp_min(0)
    cls = 0 if side == "right" else 4  # position of the first token

    def states(**inputs):
        return model(**inputs, output_hidden_states=True).hidden_states[-1]

    alone = states(input_ids=ids)[0, 0]
    together = states(input_ids=batch, attention_mask=mask, position_ids=position)[0, cls]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    with bara.sampling(model, seed=2):
        alone = states(input_ids=ids)[0, 0]
        together = states(input_ids=batch, attention_mask=mask, position_ids=position)[0, cls]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_causal_models_do_not_see_the_future(method, make):
    model = stir(adapt(make(), method, task_type="CAUSAL_LM")).eval()
    ids = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 7) % 63 + 1
    for context in (None, 4):
        with torch.no_grad():
            if context is None:
                a, b = model(input_ids=ids).logits, model(input_ids=changed).logits
            else:
                with bara.sampling(model, seed=context):
                    a, b = model(input_ids=ids).logits, model(input_ids=changed).logits
        torch.testing.assert_close(a[:, :5], b[:, :5], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(a[:, 5:], b[:, 5:])


@pytest.mark.parametrize("method", METHODS)
def test_generation_with_a_cache_uses_one_draw_for_the_sequence(method):
    noise = {"init_noise": 0.5, "max_noise": 1.0} if method == "sgp-lora" else {}
    model = stir(adapt(tiny_llama(), method, task_type="CAUSAL_LM", **noise)).eval()
    ids = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    with bara.sampling(model, seed=0):
        cached = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)
        plain = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    mean = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, mean)


def test_every_draw_is_its_own_block_and_portions_agree():
    model = net("bara").eval()
    x = torch.randn(3, 6)
    with bara.sampling(model, num_draws=4, seed=9):
        four = model(x=x.repeat(4, 1))["logits"].view(4, 3, -1)
    with bara.sampling(model, num_draws=2, seed=9, first_draw=2):
        two = model(x=x.repeat(2, 1))["logits"].view(2, 3, -1)
    torch.testing.assert_close(four[2:], two)
    assert not torch.allclose(four[0], four[1])


def test_convolutions_share_a_gate_over_the_image():
    torch.manual_seed(0)
    model = stir(adapt(TinyConv(), "bara", target_modules=["conv"])).eval()
    layer, posterior = layer_posterior(model)
    x = torch.randn(2, 3, 5, 5)
    u = layer.lora_A["default"](x)
    pooled = u.mean(dim=(2, 3))
    h = pooled / pooled.square().mean(-1, keepdim=True).sqrt()
    local = 100 * (h @ posterior.gate_weight.T / 2 + posterior.gate_bias)
    m = gate_mean(100 * posterior.global_logit) * gate_mean(local)
    expected = layer.base_layer(x) + 2.0 * layer.lora_B["default"](u * m[:, :, None, None])
    torch.testing.assert_close(layer_output(model, layer, x), expected, atol=1e-5, rtol=1e-4)


def layer_output(model, layer, x):
    outputs = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(pixel_values=x)
    handle.remove()
    return outputs[0]


def test_balora_convolution_noise_has_the_variance_of_sampled_weights():
    torch.manual_seed(0)
    model = stir(adapt(TinyConv(), "balora", target_modules=["conv"])).eval()
    layer, posterior = layer_posterior(model)
    x = torch.randn(1, 3, 4, 4)
    a = layer.lora_A["default"].weight.detach()
    pooled = layer.lora_A["default"](x).mean(dim=(2, 3))
    h = pooled / pooled.square().mean(-1, keepdim=True).sqrt()
    alpha = (torch.nn.functional.softplus(10 * balora_network(posterior, h)) + 1e-6).detach()
    draws = 4000
    weights = a + alpha.view(1, 1, 1, 1) ** 0.5 * a.abs() * torch.randn(draws, *a.shape)
    u = torch.stack([torch.nn.functional.conv2d(x, w, padding=1)[0] for w in weights])
    expected = u.var(0)  # per factor and pixel
    with torch.no_grad():
        variance = alpha.view(1, 1, 1) * torch.nn.functional.conv2d(
            x.square(), a.square(), padding=1
        )
    torch.testing.assert_close(variance[0], expected, rtol=0.25, atol=1e-3)
    base = layer.base_layer(x)
    with torch.no_grad(), bara.sampling(model, num_draws=draws, seed=0):
        sampled = layer_output(model, layer, x.repeat(draws, 1, 1, 1)) - base
    b = layer.lora_B["default"].weight[:, :, 0, 0]
    exact = 4.0 * torch.einsum("ok,khw->ohw", b.square(), variance[0])
    torch.testing.assert_close(sampled.var(0), exact, rtol=0.25, atol=1e-3)


@pytest.mark.parametrize(
    ("r", "probability"), [(4, None), (11, None), (16, 11 / 16), (64, 11 / 64)]
)
def test_of_many_factors_bara_starts_with_some(r, probability):
    _, posterior = layer_posterior(adapt(TinyNet(), r=r, target_modules=["layer"]))
    logit = torch.tensor([3.0, 100 * posterior.gate_bias.mean().item()])
    usual, opened = torch.sigmoid(logit - 0.66 * math.log(0.1 / 1.1)).tolist()
    assert opened == pytest.approx(usual if probability is None else probability, abs=1e-3)


def test_bara_starts_where_init_local_logit_says():
    options = {"r": 64, "target_modules": ["layer"], "init_local_logit": 3.0}
    _, posterior = layer_posterior(adapt(TinyNet(), **options))
    assert posterior.gate_bias.mean().item() == pytest.approx(3.0 / 100)
