"""Effective rank under draws, its shift between data sets, and the report."""

import base64
import json
from dataclasses import replace

import pytest
import torch
from scipy.stats import mannwhitneyu, spearmanr

import bara
from bara import BaraError
from bara.prediction.predictive import ClassificationPredictive, RegressionPredictive
from bara.ranks.effective_rank import EffectiveRank
from bara.reports import plots
from bara.reports.rank_report import RankReport, prediction_errors, write_rank_report
from helpers import TinyNet, adapt, layer_posterior, stir
from test_report import HOSTILE, PNG, Page


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = adapt(TinyNet(), target_modules=["layer"])
    _, posterior = layer_posterior(model)
    with torch.no_grad():  # gates that are half open
        posterior.global_logit.zero_()
        posterior.gate_bias.zero_()
    return stir(model, 0.1).eval()


def active_factors(model, x, seed, num_draws):
    """Factors that took part in each draw's output, solved for from the output: (S, n, r)."""
    layer, _ = layer_posterior(model)
    b = layer.lora_B["default"].weight.double()
    with torch.no_grad(), bara.sampling(model, num_draws=num_draws, seed=seed):
        drawn = model(x=x.repeat(num_draws, 1))["logits"].double()
    with torch.no_grad(), model.disable_adapter():
        plain = model(x=x.repeat(num_draws, 1))["logits"].double()
    used = torch.linalg.lstsq(b, ((drawn - plain) / layer.scaling["default"]).T).solution.T
    return (used.abs() > 1e-6).view(num_draws, len(x), -1)


def test_draws_count_the_factors_that_reach_the_output(net):
    x = torch.randn(7, 6)
    rank = bara.effective_rank(net, {"x": x}, num_draws=9, seed=3)
    assert rank.draws.shape == (9, 1, 7)
    expected = active_factors(net, x, 3, 9).sum(-1).float()
    assert 0 < expected.mean() < 4
    assert expected.std() > 0
    torch.testing.assert_close(rank.draws[:, 0], expected)


def test_many_draws_average_to_the_soft_rank(net):
    rank = bara.effective_rank(net, {"x": torch.randn(3, 6)}, num_draws=4000, seed=0)
    error = 4 * (4 / 4 / 4000) ** 0.5  # four standard errors of a sum of four coins
    torch.testing.assert_close(rank.draws.mean(dim=0), rank.soft, atol=error, rtol=0)
    counts = rank.draws.mean(dim=(1, 2))
    assert rank.s_bar_std == pytest.approx(counts.std().item())
    assert rank.per_layer_std.shape == (1,)
    by_input = [rank.draws[:, :, i].mean(dim=1).std().item() for i in range(3)]
    assert rank.per_input_std.tolist() == pytest.approx(by_input)
    assert max(by_input) > counts.std().item()  # an average varies no more than its parts


def test_draws_do_not_depend_on_the_batches(net):
    rows = [{"x": row} for row in torch.randn(8, 6)]
    whole = bara.effective_rank(net, rows, num_draws=3, batch_size=100)
    parts = bara.effective_rank(net, rows, num_draws=3, batch_size=6)
    torch.testing.assert_close(whole.draws, parts.draws)
    torch.testing.assert_close(whole.soft, parts.soft)
    assert bara.effective_rank(net, rows).draws is None


def test_without_gates_every_draw_has_the_full_rank():
    model = stir(adapt(TinyNet(), "balora", target_modules=["layer"])).eval()
    rank = bara.effective_rank(model, {"x": torch.randn(3, 6)}, num_draws=2)
    assert (rank.draws == 4).all()
    assert (rank.soft == 4).all()


def test_draws_need_a_number(net):
    with pytest.raises(BaraError, match="num_draws must be at least 0"):
        bara.effective_rank(net, {"x": torch.randn(3, 6)}, num_draws=-1)


def random_rank(n: int, shift: float = 0.0, seed: int = 0) -> EffectiveRank:
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(f"l.{i}.attn.{m}" for i in (0, 1) for m in ("q", "v"))
    soft = 4 + shift + torch.rand(4, n, generator=generator)
    draws = soft + torch.randn(5, 4, 1, generator=generator)
    return EffectiveRank(layers, (8,) * 4, soft, soft.round(), draws)


def test_shift():
    first, other = random_rank(30), random_rank(40, 0.1, seed=1)
    shift = bara.rank_shift(first, other)
    ours, theirs = first.soft.mean(0).numpy(), other.soft.mean(0).numpy()
    assert shift.mean == pytest.approx(theirs.mean() - ours.mean(), abs=1e-6)
    error = (ours.var(ddof=1) / 30 + theirs.var(ddof=1) / 40) ** 0.5
    assert shift.standard_error == pytest.approx(error, rel=1e-4)
    assert shift.auroc == pytest.approx(mannwhitneyu(theirs, ours).statistic / 1200)
    torch.testing.assert_close(shift.per_layer, other.soft.mean(1) - first.soft.mean(1))


def test_shift_needs_the_same_layers_and_two_inputs():
    other = EffectiveRank(("a",), (8,), torch.ones(1, 4), torch.ones(1, 4))
    with pytest.raises(BaraError, match="the layers differ"):
        bara.rank_shift(random_rank(4), other)
    with pytest.raises(BaraError, match="at least two inputs"):
        bara.rank_shift(random_rank(4), random_rank(1))


def test_report_has_numbers_pictures_and_page(tmp_path):
    rank = random_rank(30)
    errors = (torch.arange(30) % 3 == 0).double()
    texts = [HOSTILE, *(f"text {i}" for i in range(1, 30))]
    report = RankReport("test.csv", rank, texts, ("news", random_rank(20, 0.5, 1)), errors)
    report = replace(report, frozen="Rank 0 would do.")
    write_rank_report(tmp_path / "out", report, notes=[HOSTILE])
    folder = tmp_path / "out"
    names = {"ranks.json", "report.html"}
    pictures = {"layers.png", "inputs.png", "shift.png", "error.png"}
    assert {path.name for path in folder.iterdir()} == names | pictures
    for name in pictures:
        assert (folder / name).read_bytes().startswith(PNG)
    page = Page((folder / "report.html").read_text("utf-8"))
    assert len(page.addresses) == 8
    for address in page.addresses:
        kind, content = address.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content).startswith(PNG)
    assert "script" not in page.tags
    highest = max(range(30), key=lambda i: rank.per_input[i])
    assert texts[highest] in page.words
    assert "Rank 0 would do." in page.words
    numbers = json.loads((folder / "ranks.json").read_text())
    assert numbers["s_bar"] == pytest.approx(rank.soft.mean().item())
    assert numbers["spearman"] == pytest.approx(spearmanr(rank.soft.mean(0), errors).statistic)
    q, v = numbers["modules"]
    assert (q["module"], v["module"], q["layers"]) == ("q", "v", 2)
    assert v["soft"] == pytest.approx(rank.soft[[1, 3]].mean().item())
    assert v["hard"] == pytest.approx(rank.hard[[1, 3]].mean().item())
    assert v["± draws"] == pytest.approx(rank.draws[:, [1, 3]].mean((1, 2)).std().item())
    assert v["highest"] == pytest.approx(rank.soft.mean(1)[[1, 3]].max().item())


def test_report_without_labels_and_draws(tmp_path):
    rank = random_rank(3)
    plain = EffectiveRank(rank.layers, rank.max_rank, rank.soft, rank.hard)
    report = RankReport("a", plain, ["x", "y", "z"])
    write_rank_report(tmp_path / "out", report)
    assert not (tmp_path / "out" / "error.png").exists()
    assert report.spearman is None
    assert "–" in Page((tmp_path / "out" / "report.html").read_text("utf-8")).words


def test_errors_of_predictions():
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    classified = ClassificationPredictive(probs.log()[None], torch.tensor([1, 1]))
    assert prediction_errors(classified).tolist() == [1, 0]
    means = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    regressed = RegressionPredictive(means, torch.ones(2, 2), torch.tensor([0.0, 2.5]))
    assert prediction_errors(regressed).tolist() == [2, 0.5]


def test_picture_of_error_by_rank_has_the_groups_means():
    rank, error = torch.arange(10.0), torch.tensor([1.0] * 4 + [0.0] * 6)
    ((line, *_),) = [c.lines for c in plots.error_by_rank(rank, error).axes[0].containers]
    assert line.get_ydata().tolist() == [1, 1, 0, 0, 0]
    assert line.get_xdata().tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
