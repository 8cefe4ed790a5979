"""The probe's posterior against Hessians by automatic differentiation, and its folder."""

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_score
from torch.autograd.functional import hessian

import bara
from bara.draws.draws import attach_draws, draw_source
from bara.errors import BaraError
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.methods.linear import (
    VARIANCES,
    cross_validated,
    logistic_posterior,
    ridge_posterior,
)
from bara.methods.probe import ProbeOptions, raw_weights
from bara.methods.recipe import TrainRecipe
from bara.methods.weight_draws import WeightDraws
from bara.prediction.batches import pad_rows
from bara.training.logistic import Standardised
from test_methods import TABLE, base_dir, train  # noqa: F401  (a fixture)


def data(n=40, d=3, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.double)
    y = (x[:, 0] + torch.randn(n, generator=generator)).argsort().argsort() * classes // n
    return x, y


def negative_log_posterior(x, y, variance):
    def value(weights):
        nll = torch.nn.functional.cross_entropy(x @ weights.T, y, reduction="sum")
        return nll + weights.square().sum() / (2 * variance)

    return value


def covariance_of(factors):
    """Of the flattened matrix, by the noise that unit vectors become."""
    size = factors.left.shape[0] if factors.left is not None else factors.scale.shape[0]
    shape = (size, factors.right.shape[0])
    root = torch.stack([factors.noise(e.view(shape)).flatten() for e in torch.eye(np.prod(shape))])
    return root.T @ root


@pytest.mark.parametrize("classes", [2, 3])
def test_the_mean_is_the_mode_of_the_posterior(classes):
    x, y = data(classes=classes)
    for num_classes in (classes, classes + 1):  # the last has no text
        weights = logistic_posterior(x, y, 0.5, num_classes).mean.requires_grad_()
        loss = negative_log_posterior(x, y, 0.5)(weights)
        (gradient,) = torch.autograd.grad(loss, weights)
        assert gradient.abs().max() < 2e-3 * len(x)  # scikit-learn's tolerance, of a mean


def test_the_covariance_for_two_classes_is_the_inverse_hessian():
    x, y = data(classes=2)
    posterior = logistic_posterior(x, y, 0.7, 2)
    exact = hessian(negative_log_posterior(x, y, 0.7), posterior.mean).reshape(6, 6).inverse()
    torch.testing.assert_close(covariance_of(posterior.covariance).double(), exact)


def test_the_covariance_of_one_text_is_the_inverse_hessian():
    """With several texts and more than two classes it is an approximation: of the right trace."""
    x, y = data(n=9)
    one = logistic_posterior(x[:1], y[:1], 0.7, 3)
    exact = hessian(negative_log_posterior(x[:1], y[:1], 0.7), one.mean).reshape(9, 9).inverse()
    torch.testing.assert_close(covariance_of(one.covariance).double(), exact)
    several = logistic_posterior(x, y, 0.7, 3)
    curvature = hessian(negative_log_posterior(x, y, 0.7), several.mean).reshape(9, 9)
    assert float(several.curvature.sum()) == pytest.approx(float(curvature.trace()) - 9 / 0.7)


def test_ridge_regression_has_the_posterior_of_the_gaussian_model():
    x, _ = data()
    y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + 0.3 * data(seed=1)[0][:, 0]
    posterior = ridge_posterior(x, y, variance=2.0)
    precision = x.T @ x + torch.eye(3) / 2.0  # in units of the noise
    mean = precision.inverse() @ x.T @ y
    torch.testing.assert_close(posterior.mean[0], mean)
    hat = (x @ precision.inverse() @ x.T).trace()
    noise = float((y - x @ mean).square().sum() / (len(x) - hat))
    assert posterior.noise == pytest.approx(noise)
    torch.testing.assert_close(
        covariance_of(posterior.covariance).double(), noise * precision.inverse()
    )


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_layer_on_raw_features_is_the_model_on_scaled_ones(task):
    x, y = data(classes=2)
    x = 5 + 0.1 * x
    scale = Standardised.of(x)
    scaled = scale(x)
    assert scaled[:, :3].mean(0).abs().max() < 1e-9
    assert float(scaled[:, :3].square().mean()) == pytest.approx(1)
    assert float(scaled[:, 3].square().mean()) == pytest.approx(3)
    classes = task == "classification"
    posterior = logistic_posterior(scaled, y, 1.0, 2) if classes else ridge_posterior(scaled, y, 1)
    weights, covariance = raw_weights(scale, posterior)
    rows = torch.cat([x, torch.ones(len(x), 1)], 1)
    expected = scaled @ posterior.mean.T
    if not classes:
        noise = torch.full((len(x), 1), posterior.noise).log()
        expected = torch.cat([expected, noise], 1)
    torch.testing.assert_close(rows @ weights.double().T, expected, atol=1e-4, rtol=1e-4)
    inner = covariance_of(posterior.covariance).double()
    for i in range(3):  # the variance of the first output
        features = torch.cat([scaled[i], torch.zeros(4 if classes else 0)])
        raw = torch.cat([rows[i], torch.zeros(4)])
        outer = covariance_of(covariance).double()
        assert float(raw @ outer @ raw) == pytest.approx(
            float(features @ inner @ features), rel=1e-3
        )


def test_the_prior_is_that_of_the_least_cross_validated_loss():
    x, y = data(n=60, d=8, classes=2)
    fit = partial(logistic_posterior, num_classes=2)
    found = cross_validated(fit, x, y, 5, tolerance=1e9, seed=3)
    folds = KFold(5, shuffle=True, random_state=3)
    losses = [
        -cross_val_score(
            LogisticRegression(C=2 * v, fit_intercept=False),
            x.numpy(),
            y.numpy(),
            cv=folds,
            scoring="neg_log_loss",
        ).mean()
        for v in VARIANCES
    ]
    assert 1 / found.precision == pytest.approx(VARIANCES[int(np.argmin(losses))])


def test_draws_are_as_wide_as_the_loss_allows():
    x, y = data(n=60, d=40, classes=3)
    fit = partial(logistic_posterior, num_classes=3)
    wide = cross_validated(fit, x, y, 5, tolerance=10.0, seed=0)
    narrow = cross_validated(fit, x, y, 5, tolerance=1e-3, seed=0)
    assert torch.equal(wide.mean, narrow.mean)
    assert narrow.precision > wide.precision
    assert narrow.loss(x, y, 50) - narrow.loss(x, y) < wide.loss(x, y, 50) - wide.loss(x, y)
    with pytest.raises(BaraError, match="3 texts cannot be shared out among 5 folds"):
        cross_validated(fit, x[:3], y[:3], 5, tolerance=1, seed=0)


def test_a_probe_is_a_head_on_the_mean_of_the_tokens(base_dir, tmp_path):  # noqa: F811
    folder = train(base_dir, tmp_path / "probe", "probe", prior_variance=0.5)
    model, tokenizer, task = load_adapter(folder)
    inputs = task.inputs(TABLE, tokenizer)
    means = []
    for row in inputs:
        ids = torch.tensor([row["input_ids"]])
        means.append(model.get_base_model().encoder(ids).last_hidden_state[0].mean(0).detach())
    x, y = torch.stack(means).double(), torch.tensor(inputs["labels"])
    scale = Standardised.of(x)
    posterior = logistic_posterior(scale(x), y, 0.5, 2)
    expected = (scale(x) @ posterior.mean.T).log_softmax(-1).float()
    mean = bara.predict(model, inputs, deterministic=True)
    torch.testing.assert_close(mean.log_probs, expected, atol=1e-3, rtol=1e-3)
    size = sum(p.numel() for n, p in model.named_parameters() if "modules_to_save" in n)
    assert size == 2 * 33
    assert (folder / "adapter_model.safetensors").stat().st_size < 4096
    draws = bara.predict(model, inputs, num_draws=300, seed=1)
    change = draws.log_probs_draws[..., 1] - draws.log_probs_draws[..., 0]
    covariance = covariance_of(posterior.covariance).double()
    difference = torch.cat([-scale(x), scale(x)], 1)
    expected = (difference @ covariance * difference).sum(1).sqrt().float()
    torch.testing.assert_close(change.std(0), expected, rtol=0.15, atol=0)


def test_a_probe_of_numbers_knows_its_noise(base_dir, tmp_path):  # noqa: F811
    values = [float(i % 4) + 0.5 for i in range(len(TABLE))]
    table = TABLE.remove_columns("label").add_column("target", values)
    recipe = TrainRecipe(model=str(base_dir), output=str(tmp_path / "out"), method="probe")
    model, tokenizer, task = load_adapter(finetune(recipe, table))
    predicted = bara.predict(model, task.inputs(table, tokenizer), num_draws=5)
    assert predicted.variance_draws.unique().numel() == 1
    mean = bara.predict(model, task.inputs(table, tokenizer), deterministic=True).mean
    assert float((mean - torch.tensor(values)).square().mean()) < float(torch.tensor(values).var())


@pytest.mark.parametrize("numbers", [False, True])
def test_draws_share_the_pass_up_to_the_layer(base_dir, tmp_path, numbers):  # noqa: F811
    """The encoder sees each text once, and the draws are those of a layer whose weights move."""
    table = TABLE
    if numbers:
        table = TABLE.remove_columns("label").add_column(
            "target", [i / 7 for i in range(len(TABLE))]
        )
    recipe = TrainRecipe(model=str(base_dir), output=str(tmp_path / "out"), method="probe")
    model, tokenizer, task = load_adapter(finetune(recipe, table))
    inputs, source = task.inputs(table, tokenizer), draw_source(model)
    seen = []
    encoder = model.get_base_model().encoder
    handle = encoder.register_forward_hook(lambda _, __, output: seen.append(len(output[0])))
    together = bara.predict(model, inputs, num_draws=7, seed=3, batch_size=len(table))
    handle.remove()
    assert seen == [len(table)]
    attach_draws(model, WeightDraws(model, source.factors))
    one_by_one = bara.predict(model, inputs, num_draws=7, seed=3, batch_size=len(table))
    draws = [p.mean_draws if numbers else p.log_probs_draws for p in (together, one_by_one)]
    assert draws[0].std(0).min() > 0
    torch.testing.assert_close(draws[0], draws[1], atol=1e-5, rtol=1e-4)
    with bara.sampling(model, 1, 3, first_draw=2):
        batch = pad_rows(list(inputs))
        batch.pop("labels")
        moved = model(**batch).logits
    attach_draws(model, source)
    with bara.sampling(model, 1, 3, first_draw=2):
        torch.testing.assert_close(model(**batch).logits, moved, atol=1e-5, rtol=1e-4)


def test_refusals(base_dir, tmp_path, failing):  # noqa: F811
    with pytest.raises(BaraError, match="prior_variance must be > 0"):
        ProbeOptions(prior_variance=0.0)
    with pytest.raises(BaraError, match=r"there is no .use_dora.; known: num_folds"):
        train(base_dir, tmp_path / "a", "probe", use_dora=True)
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    command = ["train", "--model", base_dir, "--data", tmp_path / "t.csv", "--method", "probe"]
    assert "has no training steps: leave out --epochs" in failing(*command, "--epochs", 3)
    assert "this is for classification and regression" in failing(
        *command, "--task", "causal-lm", "--output", tmp_path / "b"
    )
