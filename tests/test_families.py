"""The peers' posterior families against their papers' formulas."""

import math

import pytest
import torch
from datasets import Dataset
from torch.distributions import Normal, kl_divergence

import bara
from bara.draws.draws import Draws, FixedNoise, FreshNoise
from bara.posteriors.distributions import log_uniform_kl
from helpers import TinyConv, TinyNet, adapt, layer_posterior, stir

CPU = torch.device("cpu")


def net(method, **options):
    torch.manual_seed(0)
    return stir(adapt(TinyNet(), method, target_modules=["layer"], **options))


def matrices(layer):
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def noise_of_a(method, posterior, a):
    """The standard deviation of every element of A, by the paper's parametrisation."""
    if method == "blob":
        return posterior.noise_root.detach() ** 2
    return torch.exp(0.5 * 10 * posterior.log_variance.detach()).unsqueeze(1).expand_as(a)


@pytest.mark.parametrize("method", ["blob", "rankwise"])
def test_a_draw_is_one_matrix_a_for_all_inputs_and_tokens(method):
    model = net(method).eval()
    layer, posterior = layer_posterior(model)
    a, b = matrices(layer)
    x = torch.randn(3, 4, 6)
    with torch.no_grad(), bara.sampling(model, num_draws=2, seed=5) as draws:
        logits = model(x=x.repeat(2, 1, 1))["logits"].view(2, 3, 4, -1)
    eps = draws.numbers("layer/A", "normal", (4, 6), CPU)
    for d in range(2):
        sampled = a + noise_of_a(method, posterior, a) * eps[d]
        expected = layer.base_layer(x) + 2.0 * x @ (b @ sampled).T
        torch.testing.assert_close(logits[d], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["blob", "rankwise"])
def test_flipout_has_the_moments_of_sampled_weights(method):
    """Per input: mean and covariance over outputs and tokens. Between inputs: no covariance."""
    model = net(method).eval()
    layer, posterior = layer_posterior(model)
    a, b = matrices(layer)
    x = torch.randn(2, 2, 6)  # two inputs of two tokens
    torch.manual_seed(0)
    passes = 5000
    with torch.no_grad():
        elbo = model.base_model.model.bara_elbo
        spaces = []
        with elbo.observing(lambda name, posterior, space: spaces.append(space)):
            model(x=x)
        std = noise_of_a(method, posterior, a)
        noise = FreshNoise(2, CPU)
        samples = torch.stack(
            [spaces[0].project_noise(std, noise, "A") for _ in range(passes)]
        )  # (passes, inputs, tokens, r)
    outputs = 2.0 * samples @ b.T
    explicit = std * torch.randn(passes, *a.shape)
    reference = 2.0 * torch.einsum("bti,dri,or->dbto", x, explicit, b)
    for i in range(2):
        flat, exact = outputs[:, i].flatten(1), reference[:, i].flatten(1)
        scale = exact.std(0)
        assert (flat.mean(0).abs() < 6 * scale / passes**0.5).all()
        bound = 7 * torch.outer(scale, scale) * (2 / passes) ** 0.5
        assert ((torch.cov(flat.T) - torch.cov(exact.T)).abs() < bound).all()
    joint = torch.cov(torch.cat([outputs[:, 0].flatten(1), outputs[:, 1].flatten(1)], 1).T)
    scale = joint.diagonal().sqrt()
    bound = 7 * torch.outer(scale, scale) / passes**0.5
    assert (joint.abs() < bound)[:10, 10:].all()


@pytest.mark.parametrize("method", ["blob", "rankwise"])
def test_convolutions_draw_their_kernels(method):
    torch.manual_seed(0)
    model = stir(adapt(TinyConv(), method, target_modules=["conv"])).eval()
    layer, posterior = layer_posterior(model)
    a, b = matrices(layer)
    std = (
        posterior.noise_root.detach() ** 2
        if method == "blob"
        else torch.exp(5 * posterior.log_variance.detach()).view(-1, 1, 1, 1).expand_as(a)
    )
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad(), bara.sampling(model, num_draws=2, seed=1) as draws:
        logits = model(pixel_values=x.repeat(2, 1, 1, 1))["logits"].view(2, 2, -1)
    eps = draws.numbers("conv/A", "normal", tuple(a.shape), CPU)
    for d in range(2):
        u = torch.nn.functional.conv2d(x, a + std * eps[d], padding=1)
        hidden = layer.base_layer(x) + 2.0 * torch.nn.functional.conv2d(u, b)
        expected = model.base_model.model.head(hidden.relu().mean(dim=(2, 3)))
        torch.testing.assert_close(logits[d], expected, atol=1e-5, rtol=1e-4)
    model.train()(pixel_values=x)  # Flipout of a kernel runs
    assert bara.kl_terms(model)["kl_global"] > 0


def test_blob_kl_is_that_of_its_gaussians():
    model = net("blob", prior_std=0.3).train()
    layer, posterior = layer_posterior(model)
    model(x=torch.randn(2, 6))
    a, _ = matrices(layer)
    posterior_a = Normal(a, posterior.noise_root.detach() ** 2)
    expected = kl_divergence(posterior_a, Normal(torch.zeros_like(a), 0.3)).sum()
    assert bara.kl_terms(model)["kl_global"] == pytest.approx(expected.item(), rel=1e-4)


def test_blob_starts_as_published():
    _, posterior = layer_posterior(adapt(TinyNet(60, 5), "blob", target_modules=["layer"]))
    root = posterior.noise_root
    assert root.min() >= 0.05 / math.sqrt(2)
    assert root.max() <= 0.05


def test_the_noise_moves_at_loras_learning_rate():
    """200 steps of Adam at 1e-3 must be able to change a standard deviation a lot (trap 1)."""
    for method in ("blob", "scalabl", "rankwise"):
        options = {"target_modules": ["layer"], "kl_weight": 1.0, "warmup": 0.0}
        model = adapt(TinyNet(), method, **options).train()
        _, posterior = layer_posterior(model)

        before = posterior.std().detach().clone()
        optimiser = torch.optim.Adam(posterior.parameters(), lr=1e-3)
        x = torch.zeros(2, 6)
        for _ in range(200):
            optimiser.zero_grad()
            model(x=x)
            bara.kl_loss(model).backward()
            optimiser.step()
        assert ((posterior.std() / before).log().abs() > 0.4).float().mean() > 0.9, method


def test_log_uniform_kl_matches_the_integral():
    """-KL = log(alpha) / 2 - E log|1 + sqrt(alpha) eps| + C, against Monte Carlo, differences."""
    eps = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def exact(alpha):
        return -0.5 * math.log(alpha) + (1 + alpha**0.5 * eps).abs().log().mean().item()

    log_alphas = [-4.0, -2.0, 0.0, 1.0, 3.0]
    ours = log_uniform_kl(torch.tensor(log_alphas, dtype=torch.float64))
    theirs = torch.tensor([exact(math.exp(v)) for v in log_alphas], dtype=torch.float64)
    torch.testing.assert_close(ours - ours[-1], theirs - theirs[-1], atol=0.03, rtol=0)
    assert log_uniform_kl(torch.tensor(30.0)) == pytest.approx(0, abs=1e-6)


def test_rankwise_kl_sums_over_the_elements_of_a():
    model = net("rankwise").train()
    layer, posterior = layer_posterior(model)
    model(x=torch.randn(2, 6))
    a, _ = matrices(layer)
    expected = 0.0
    for k in range(4):
        for i in range(6):
            variance = math.exp(10 * posterior.log_variance[k].item())
            alpha = variance / a[k, i].item() ** 2
            sigmoid = 1 / (1 + math.exp(-(1.87320 + 1.48695 * math.log(alpha))))
            expected += 0.63576 * (1 - sigmoid) + 0.5 * math.log1p(1 / alpha)
    assert bara.kl_terms(model)["kl_global"] == pytest.approx(expected, rel=1e-3)


def test_scalabl_starts_with_the_singular_vectors_and_values_of_a():
    torch.manual_seed(3)
    plain = adapt(TinyNet(), "blob", seed=7, target_modules=["layer"])
    model = adapt(TinyNet(), "scalabl", seed=7, target_modules=["layer"])
    start, _ = matrices(layer_posterior(plain)[0])
    layer, posterior = layer_posterior(model)
    a, _ = matrices(layer)
    torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-5, rtol=0)
    values = torch.linalg.svdvals(start)
    torch.testing.assert_close(posterior.mean().detach(), values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a.T @ a @ start.T, start.T, atol=1e-5, rtol=1e-4)  # same subspace


def test_scalabl_draws_and_kl():
    model = net("scalabl", prior_std=0.7).eval()
    layer, posterior = layer_posterior(model)
    a, b = matrices(layer)
    mean = posterior.log_mean.detach().exp()
    std = (10 * posterior.log_std.detach()).exp()
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = layer.base_layer(x) + 2.0 * x @ (b @ torch.diag(mean) @ a).T
        torch.testing.assert_close(model(x=x)["logits"], expected, atol=1e-5, rtol=1e-4)
        with bara.sampling(model, num_draws=2, seed=5) as draws:
            logits = model(x=x.repeat(2, 1))["logits"].view(2, 3, -1)
        eps = draws.numbers("layer/s", "normal", (4,), CPU)
        for d in range(2):
            weight = b @ torch.diag(mean + std * eps[d]) @ a
            expected = layer.base_layer(x) + 2.0 * x @ weight.T
            torch.testing.assert_close(logits[d], expected, atol=1e-5, rtol=1e-4)
    model.train()(x=x)
    kl = kl_divergence(Normal(mean, std), Normal(torch.zeros(4), 0.7)).sum()
    assert bara.kl_terms(model)["kl_global"] == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_clora_draws_and_kl(granularity):
    model = net("clora", prior_std=0.7, granularity=granularity).eval()
    layer, posterior = layer_posterior(model)
    a, b = matrices(layer)
    x = torch.randn(3, 5, 6)

    def network(u):
        hidden = torch.relu(u @ posterior.hidden_weight.T + posterior.hidden_bias)
        mean, root = (hidden @ posterior.output_weight.T + posterior.output_bias).split(16)
        return mean.view(4, 4), root.sigmoid().square().view(4, 4)

    def expected(eps=None):
        rows = []
        for i in range(3):
            u = x[i] @ a.T
            read = u if granularity == "token" else u.mean(0).expand(5, 4)
            for t in range(5):
                mean, std = network(read[t])
                matrix = mean if eps is None else mean + std * eps[i].view(4, 4)
                rows.append(layer.base_layer(x[i, t]) + 2.0 * b @ matrix @ u[t])
        return torch.stack(rows).view(3, 5, -1)

    with torch.no_grad():
        torch.testing.assert_close(model(x=x)["logits"], expected(), atol=1e-5, rtol=1e-4)
        with bara.sampling(model, num_draws=2, seed=5) as draws:
            logits = model(x=x.repeat(2, 1, 1))["logits"].view(2, 3, 5, -1)
        eps = draws.numbers("layer/E", "normal", (16,), CPU)
        for d in range(2):
            drawn = expected(eps[d].expand(3, 16))
            torch.testing.assert_close(logits[d], drawn, atol=1e-5, rtol=1e-4)
    model.train()(x=x)
    read = x @ a.T if granularity == "token" else (x @ a.T).mean(1, keepdim=True)
    kls = [
        kl_divergence(Normal(mean, std), Normal(torch.zeros(4, 4), 0.7)).sum().item()
        for mean, std in (network(u) for u in read.flatten(0, 1))
    ]
    expected_kl = sum(kls) / len(kls)
    assert bara.kl_terms(model)["kl_global"] == pytest.approx(expected_kl, rel=1e-4)


@pytest.mark.parametrize("kind", ["layer", "conv"])
def test_clora_averages_its_matrix_for_plain_draws_and_has_no_merged_form(kind):
    torch.manual_seed(0)
    module = TinyNet() if kind == "layer" else TinyConv()
    model = stir(adapt(module, "clora", target_modules=[kind])).eval()
    layer, posterior = layer_posterior(model)
    noise = FixedNoise(Draws(1, seed=3), torch.tensor([0]), kind)
    a = layer.lora_A["default"].weight
    with pytest.raises(bara.BaraError, match="calibration inputs"):
        posterior.lora_draw(a, noise)
    shape, name = ((6, 4, 6), "x") if kind == "layer" else ((6, 3, 5, 5), "pixel_values")
    data = Dataset.from_dict({name: torch.randn(shape).tolist()}).with_format("torch")
    bara.calibrate_gates(model, data)
    with pytest.raises(bara.BaraError, match="no merged form"):
        model.merge_adapter()
    mean, std = posterior.calibrated.view(2, 4, 4)
    eps = noise.normal("E", (16,)).view(4, 4)
    drawn, scale = posterior.lora_draw(a, noise)
    expected = torch.einsum("ij,j...->i...", mean + std * eps, a)
    assert scale is None
    torch.testing.assert_close(drawn, expected)


def test_clora_refuses_grouped_convolutions():
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(bara.BaraError, match="grouped convolution"):
        adapt(module, "clora", target_modules=["0"])


def test_sgp_lora_draws_and_kl():
    model = net("sgp-lora", init_noise=0.05, max_noise=0.2).eval()
    layer, posterior = layer_posterior(model)
    with torch.no_grad():
        posterior.log_std.add_(0.02 * torch.randn(4, 4))
        posterior.log_std[0, 1] = 1.0  # beyond max_noise
    a, b = matrices(layer)
    std = (10 * posterior.log_std.detach()).exp().clamp(max=0.2)
    assert std[0, 1] == 0.2
    cholesky = torch.linalg.cholesky((a @ a.T + 1e-4 * torch.eye(4)).double())
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = layer.base_layer(x) + 2.0 * x @ (b @ a).T
        torch.testing.assert_close(model(x=x)["logits"], expected, atol=1e-5, rtol=1e-4)
        with bara.sampling(model, num_draws=2, seed=5) as draws:
            logits = model(x=x.repeat(2, 1))["logits"].view(2, 3, -1)
        eps = draws.numbers("layer/U", "normal", (16,), CPU)
        for d in range(2):
            core = cholesky + std * eps[d].view(4, 4)
            weight = b.double() @ core @ torch.linalg.inv(cholesky) @ a.double()
            expected = layer.base_layer(x) + 2.0 * x @ weight.float().T
            torch.testing.assert_close(logits[d], expected, atol=1e-5, rtol=1e-4)
    model.train()(x=x)
    prior = Normal(torch.zeros(4, 4, dtype=torch.float64), 1.0)
    kl = kl_divergence(Normal(cholesky, std.double()), prior).sum()
    assert bara.kl_terms(model)["kl_global"] == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["layer", "conv"])
def test_sgp_lora_draws_as_plain_lora_are_its_draws(kind):
    torch.manual_seed(0)
    module = TinyNet() if kind == "layer" else TinyConv()
    model = stir(adapt(module, "sgp-lora", target_modules=[kind])).eval()
    layer, posterior = layer_posterior(model)
    a = layer.lora_A["default"].weight
    draws = Draws(1, seed=3)
    drawn, scale = posterior.lora_draw(a, FixedNoise(draws, torch.tensor([0]), kind))
    shape, name = ((2, 6), "x") if kind == "layer" else ((2, 3, 5, 5), "pixel_values")
    x = torch.randn(shape)
    with torch.no_grad(), bara.sampling(model, num_draws=1, seed=3):
        expected = model(**{name: x})["logits"]
    with torch.no_grad():
        a.copy_(drawn)
        plain = model(**{name: x})["logits"]
    assert scale is None
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"init_noise": 0.2}, {"max_noise": 0.0}])
def test_sgp_lora_refuses_noise_that_cannot_be(options):
    with pytest.raises(bara.BaraError, match=r"init_noise|max_noise"):
        bara.SgpLoraConfig(**options)


def test_sgp_lora_refuses_grouped_convolutions():
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(bara.BaraError, match="grouped convolution"):
        adapt(module, "sgp-lora", target_modules=["0"])


def test_scalabl_needs_as_many_inputs_as_factors():
    with pytest.raises(bara.BaraError, match="exceeds a layer's 6 inputs"):
        adapt(TinyNet(), "scalabl", r=7, target_modules=["layer"])


def test_mc_dropout_drops_the_same_features_for_all_tokens():
    model = net("mc-dropout", dropout_rate=0.4).eval()
    layer, _ = layer_posterior(model)
    a, b = matrices(layer)
    x = torch.randn(3, 5, 6)
    with torch.no_grad(), bara.sampling(model, num_draws=4, seed=2) as draws:
        logits = model(x=x.repeat(4, 1, 1))["logits"].view(4, 3, 5, -1)
    keep = draws.numbers("layer/mask", "uniform", (6,), CPU) >= 0.4
    assert 0 < keep.float().mean() < 1
    for d in range(4):
        expected = layer.base_layer(x) + 2.0 * (x * keep[d] / 0.6) @ (b @ a).T
        torch.testing.assert_close(logits[d], expected, atol=1e-5, rtol=1e-4)


def test_mc_dropout_trains_with_dropout_and_without_warnings(recwarn):
    model = net("mc-dropout").train()
    x, y = torch.randn(4, 6), torch.randn(4, 5)
    losses = []
    for _ in range(3):
        output = model(x=x, labels=y)
        output["loss"].backward()
        data = (output["logits"] - y).square().mean()
        torch.testing.assert_close(output["loss"], data)
        losses.append(data.item())
    assert len(set(losses)) == 3
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("method", ["blob", "rankwise", "scalabl", "mc-dropout"])
@pytest.mark.parametrize("kind", ["layer", "conv"])
def test_a_draw_as_plain_lora_is_the_sampled_forward(method, kind):
    torch.manual_seed(0)
    net = TinyNet() if kind == "layer" else TinyConv()
    name, inputs = (
        ("x", torch.randn(3, 4, 6))
        if kind == "layer"
        else ("pixel_values", torch.randn(3, 3, 5, 5))
    )
    model = stir(adapt(net, method, target_modules=[kind])).eval()
    layer, posterior = layer_posterior(model)
    a_module, b_module = layer.lora_A["default"], layer.lora_B["default"]
    outputs = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad(), bara.sampling(model, num_draws=2, seed=5) as draws:
        model(**{name: inputs.repeat(2, *[1] * (inputs.dim() - 1))})
        for d in range(2):
            noise = FixedNoise(draws, torch.tensor([d]), kind)
            a, scale = posterior.lora_draw(a_module.weight, noise)
            b = b_module.weight
            if scale is not None:
                b = b * scale.reshape(1, -1, *[1] * (b.dim() - 2))
            u = torch.func.functional_call(a_module, {"weight": a}, (inputs,))
            update = torch.func.functional_call(b_module, {"weight": b}, (u,))
            expected = layer.base_layer(inputs) + layer.scaling["default"] * update
            drawn = outputs[0][3 * d : 3 * d + 3]
            torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-4)
