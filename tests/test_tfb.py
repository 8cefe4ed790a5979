"""TFB against its paper's formula and an exhaustive search."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

import bara
from bara.draws.draws import attach_draws
from bara.methods import Factors, WeightDraws, tfb
from helpers import TinyNet, adapt, stir


class Classifier(TinyNet):
    """Its logits are the outputs of the adapted layer."""

    def forward(self, input_ids=None, x=None):
        return {"logits": self.layer(x)}


def lora(scale=1.0):
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["layer"])
    return stir(get_peft_model(Classifier(), config), scale)


def batch(n=64):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = lora()(x=x)["logits"].argmax(-1)
    return {"x": x, "labels": labels}


def layer_of(model):
    return next(m for m in model.modules() if hasattr(m, "lora_A"))


def test_the_noise_of_the_product_is_isotropic_in_the_span_of_b():
    model = lora()
    sigma = tfb(model, batch())
    layer = layer_of(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    mean = (b @ a).detach().clone()
    draws = []
    for d in range(4000):
        with bara.sampling(model, seed=3, first_draw=d):
            draws.append((b @ a).detach() - mean)
    noise = torch.stack(draws)  # (draws, outputs, inputs)
    torch.testing.assert_close((b @ a).detach(), mean)  # the mean is back
    u = torch.linalg.svd(b.detach(), full_matrices=False)[0]
    expected = sigma**2 * u @ u.T  # per column of the product
    for column in range(6):
        torch.testing.assert_close(
            torch.cov(noise[:, :, column].T), expected, atol=0.15 * sigma**2, rtol=0
        )
    across = torch.einsum("doi,doj->ij", noise, noise) / 4000
    assert (across - across.diag().diag()).abs().max() < 0.2 * sigma**2 * 3


def test_a_layer_with_fewer_outputs_than_the_rank():
    config = LoraConfig(r=8, target_modules=["layer"])
    model = stir(get_peft_model(Classifier(), config))
    layer = layer_of(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert b.shape[0] < 8
    sigma, mean = tfb(model, batch()), (b @ a).detach().clone()
    noise = []
    for d in range(4000):
        with bara.sampling(model, seed=3, first_draw=d):
            noise.append((b @ a).detach() - mean)
    variance = torch.stack(noise).var(dim=0)  # B spans all of the outputs
    torch.testing.assert_close(
        variance, torch.full_like(variance, sigma**2), atol=0.15 * sigma**2, rtol=0
    )


@pytest.mark.parametrize("tolerance", [0.003, 0.05])
def test_sigma_is_that_of_an_exhaustive_search(tolerance):
    data = batch()
    model = lora()
    sigma = tfb(model, data, tolerance=tolerance, num_draws=5, rounds=10)
    layer = layer_of(model)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    _, d, vt = torch.linalg.svd(b, full_matrices=False)
    draws = bara.draws.draws.Draws(5, seed=0)
    name = next(n for n, _ in model.named_parameters() if "lora_A" in n)
    eps = draws.numbers(name, "normal", tuple(a.shape), torch.device("cpu"))

    def loss(sigma):
        probability = 0
        for e in eps:
            draw = vt.T @ (vt @ a + sigma / d.unsqueeze(1) * e)
            logits = layer.base_layer(data["x"]) + 2.0 * data["x"] @ (b @ draw).T
            probability = probability + logits.softmax(-1) / 5
        return -probability[torch.arange(64), data["labels"]].log().mean().item()

    grid = [1e-4 * 1.02**i for i in range(465)]  # up to 1
    bearable = [s for s in grid if loss(s) <= loss(0) * (1 + tolerance)]
    first_failure = next(s for s in grid if s not in bearable)
    assert 2e-4 < sigma < 0.9
    assert sigma == pytest.approx(first_failure, rel=0.03)


def test_the_time_left_is_that_of_the_losses_to_come(terminal):
    """Ten of them with eight rounds; two where the largest noise is borne."""
    tfb(lora(), batch(), tolerance=0.003)
    assert re.search(r"fitting the noise: 100%.* 10/10 \[00:\d\d<00:00", terminal())
    assert tfb(lora(), batch(), tolerance=1e9) == 1.0
    assert " 2/10 [" in terminal()


def test_no_bar_is_shown_where_there_is_no_terminal(capsys):
    tfb(lora(), batch())
    assert capsys.readouterr() == ("", "")


def test_without_labels_the_own_predictions_count():
    data = batch()
    model, other = lora(), lora()
    labels = bara.predict(model, data, deterministic=True).prediction
    expected = tfb(model, {**data, "labels": labels})
    assert tfb(other, {"x": data["x"]}) == expected


def test_an_adapter_trained_elsewhere(tmp_path):
    from peft import PeftModel

    model = lora()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Classifier(), tmp_path)
    assert tfb(loaded, batch()) == pytest.approx(tfb(model, batch()))
    ours = bara.predict(model, batch(), num_draws=3)
    theirs = bara.predict(loaded, batch(), num_draws=3)
    torch.testing.assert_close(ours.log_probs_draws, theirs.log_probs_draws)


@pytest.mark.parametrize("kind", ["rows", "words"])
def test_draws_in_one_batch_are_those_of_one_at_a_time(kind):
    """Weights and biases of linear layers, on inputs of two and of three dimensions."""
    model = lora()
    x = torch.randn(5, 6) if kind == "rows" else torch.randn(5, 4, 6)
    names = [n for n, _ in model.named_parameters() if "lora_A" in n or n.endswith("bias")]
    scales = {n: torch.rand(p.shape) for n, p in model.named_parameters() if n in names}
    assert len(names) == 2
    attach_draws(model, WeightDraws(model, {n: Factors(scales[n]) for n in names}))
    with torch.no_grad():
        with bara.sampling(model, 3, seed=7):
            together = model(x=x.repeat(3, *[1] * (x.dim() - 1)))["logits"]
        for d in range(3):
            with bara.sampling(model, seed=7, first_draw=d):
                torch.testing.assert_close(together[5 * d : 5 * (d + 1)], model(x=x)["logits"])
        with bara.sampling(model, 3), pytest.raises(bara.BaraError, match="cannot hold 3 draws"):
            model(x=x)


def test_refusals(tmp_path):
    with pytest.raises(bara.BaraError, match="a posterior already"):
        tfb(adapt(TinyNet(), "bara", target_modules=["layer"]), batch())
    with pytest.raises(bara.BaraError, match="no LoRA adapter"):
        tfb(TinyNet(), batch())
    model = lora()
    tfb(model, batch())
    with pytest.raises(bara.BaraError, match="missing or damaged"):
        WeightDraws.load(model, tmp_path)
    model.__dict__["bara_draws"].save(tmp_path)
    with pytest.raises(bara.BaraError, match="which the model has not"):
        WeightDraws.load(TinyNet(), tmp_path)
