"""The report as a browser would take it: self-contained, escaped, complete; and its pictures."""

import base64
import os
import re
from dataclasses import dataclass
from html.parser import HTMLParser

import matplotlib
import pytest
import torch
from torch import Tensor

from bara.errors import BaraError
from bara.evaluation.metrics import Evaluation, classification_metrics, regression_metrics
from bara.prediction.predictive import ClassificationPredictive, RegressionPredictive
from bara.reports import plots
from bara.reports.report import write_report
from bara.reports.style import save_figure, to_png

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "<script>alert('x')</script> & \"quoted\" $x^2$ __a__ %s {{ 7 * 7 }}"


@dataclass
class Rank:
    """Stands in for `bara.ranks.effective_rank.EffectiveRank`."""

    layers: tuple[str, ...]
    max_rank: tuple[int, ...]
    soft: Tensor

    @property
    def per_layer(self) -> Tensor:
        return self.soft.mean(1)

    @property
    def per_input(self) -> Tensor:
        return self.soft.mean(0)

    @property
    def s_bar(self) -> float:
        return self.soft.mean().item()


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.alternatives: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        if tag == "img":
            self.alternatives.append(attributes["alt"])

    def handle_data(self, data):
        self.words += data


@pytest.fixture
def rank() -> Rank:
    layers = tuple(
        f"base_model.model.bert.encoder.layer.{i}.attention.self.{module}"
        for i in (0, 1, 10, 2)
        for module in ("query", "value")
    )
    soft = torch.arange(1.0, 9.0)[:, None] * torch.linspace(0.5, 1, 30)
    return Rank(layers, (8,) * 8, soft)


@pytest.fixture
def classified() -> dict[str, Evaluation]:
    torch.manual_seed(0)
    evaluations = {}
    for name, scale in (("LoRA", 4.0), (HOSTILE, 1.0)):
        labels = torch.randint(3, (200,))
        logits = scale * (torch.nn.functional.one_hot(labels, 3) + torch.randn(4, 200, 3))
        predictive = ClassificationPredictive(logits.log_softmax(-1), labels)
        evaluations[name] = Evaluation(classification_metrics(predictive), predictive)
    return evaluations


@pytest.fixture
def regressed() -> dict[str, Evaluation]:
    torch.manual_seed(0)
    predictive = RegressionPredictive(torch.randn(3, 90), torch.ones(3, 90), torch.randn(90))
    return {"BaRA": Evaluation(regression_metrics(predictive), predictive)}


def written(path, **arguments) -> tuple[str, Page]:
    write_report(path, **{"title": "t", "table": [], "evaluations": {}, **arguments})
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_everything_is_there_and_nothing_is_loaded(tmp_path, classified, rank):
    table = [
        {"method": "LoRA", "accuracy": 0.71, "nll": 1.09, "s_bar": 8.0, "r": 8, "seconds": 12.3},
        {"method": "BaRA", "accuracy": 0.755, "nll": 0.714, "s_bar": 2.7, "r": 8, "seconds": None},
    ]
    example = {"text": "so good", "prediction": "positive", "confidence": 0.9, "uncertainty": 0.3}
    _, page = written(
        tmp_path / "report.html",
        title="Tweets",
        table=table,
        evaluations=classified,
        rank=rank,
        examples={"Sure": [{**example, "label": "positive"}, {**example, "label": None}]},
        notes=["seed 0"],
    )
    assert len(page.addresses) == 8  # four pictures, in light and dark
    for address in page.addresses:
        kind, content = address.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content).startswith(PNG)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.alternatives) == 4
    assert all(page.alternatives)
    for expected in ("Tweets", "75.5%", "0.714", "2.70 of 8", "–", "so good", "90% sure", "seed 0"):
        assert expected in page.words
    assert os.listdir(tmp_path) == ["report.html"]


def test_the_best_value_is_marked_by_its_direction(tmp_path):
    table = [
        {"method": "a", "accuracy": 0.7, "nll": 1.0, "brier": 0.5, "mine": 2},
        {"method": "b", "accuracy": 0.8, "nll": 1.2, "brier": 0.50001, "mine": 3},
    ]
    text, _ = written(tmp_path / "r.html", table=table)
    marked = re.findall(r'<td class="number best">(.*?)</td>', text)
    assert marked == ["1.000", "0.500", "80.0%", "0.500"]


def test_text_is_never_markup(tmp_path, classified):
    example = {"confidence": 0.5, "uncertainty": 0.1}
    text, page = written(
        tmp_path / "r.html",
        title=HOSTILE,
        table=[{"method": HOSTILE, HOSTILE: HOSTILE}],
        evaluations=classified,
        examples={HOSTILE: [{"text": HOSTILE, "prediction": HOSTILE, "label": "b", **example}]},
        notes=[HOSTILE],
    )
    assert "script" not in page.tags
    assert "<script" not in text
    assert page.words.count(HOSTILE) >= 8
    assert any(HOSTILE in alternative for alternative in page.alternatives)


def test_sentences_state_the_numbers(tmp_path):
    # Sure of 0.9 in all four cases, right in three; the wrong one is the least sure.
    probs = torch.tensor([[0.92, 0.08], [0.9, 0.1], [0.94, 0.06], [0.84, 0.16]])
    predictive = ClassificationPredictive(probs.log()[None], torch.tensor([0, 0, 0, 1]))
    evaluation = Evaluation(classification_metrics(predictive), predictive)
    _, page = written(tmp_path / "r.html", evaluations={"M": evaluation})
    assert "M says it is 90% sure on average, and is right 75% of the time." in page.words
    assert "M is wrong in 25% of all cases, and in 0% of the half it is surest of." in page.words


def test_regression_report(tmp_path, regressed):
    _, page = written(tmp_path / "r.html", evaluations=regressed)
    assert len(page.addresses) == 4
    assert "root mean squared error" in page.words
    assert "80% sure" not in page.words


def test_two_kinds_in_one_picture_are_refused(tmp_path, classified, regressed):
    with pytest.raises(BaraError, match="all classification or all regression"):
        written(tmp_path / "r.html", evaluations={**classified, **regressed})
    assert os.listdir(tmp_path) == []


def test_pictures_show_the_numbers_and_leave_matplotlib_alone(tmp_path, classified, rank):
    settings = dict(matplotlib.rcParams)
    heat = plots.effective_rank_heatmap(rank).axes[0]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["0", "1", "2", "10"]
    assert [label.get_text() for label in heat.get_yticklabels()] == ["query", "value"]
    # Layers 0, 1, 10, 2 have 1 … 8 times .75, query and value in turn.
    expected = [[0.75, 2.25, 5.25, 3.75], [1.5, 3.0, 6.0, 4.5]]
    torch.testing.assert_close(
        torch.tensor(heat.images[0].get_array().tolist()), torch.tensor(expected)
    )
    bars = plots.effective_rank_histogram(rank).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == 30
    curves = plots.risk_coverage(classified).axes[0].lines
    for curve, evaluation in zip(curves, classified.values(), strict=True):
        assert curve.get_ydata()[-1] == pytest.approx(1 - evaluation.metrics["accuracy"])
    save_figure(plots.reliability_diagram(classified), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert dict(matplotlib.rcParams) == settings


def test_coverage_picture_of_a_known_distribution(regressed):
    predictive = regressed["BaRA"].predictive
    line = plots.reliability_diagram(regressed).axes[0].lines[1]
    for level, covered in list(zip(line.get_xdata(), line.get_ydata(), strict=True))[1:-1:7]:
        lower, upper = predictive.interval(float(level))
        inside = (lower <= predictive.labels) & (predictive.labels <= upper)
        assert covered == pytest.approx(inside.double().mean().item())


@pytest.mark.parametrize(
    ("layers", "rows", "columns"),
    [
        (
            ["l.0.attention.output.dense", "l.0.output.dense", "l.0.up.dense", "classifier"],
            ["attention.output.dense", "l.output.dense", "up.dense", "classifier"],
            ["0", "–"],
        ),
        (
            ["encoder.block.0.q", "decoder.block.0.q"],
            ["encoder.block.q", "decoder.block.q"],
            ["0"],
        ),
        (["m.layers.3.experts.0.up", "m.layers.3.experts.1.up"], ["0.up", "1.up"], ["3"]),
        (["a", "b"], ["a", "b"], ["–"]),
    ],
)
def test_layer_names_become_rows_and_columns(layers, rows, columns):
    rank = Rank(tuple(layers), (4,) * len(layers), torch.ones(len(layers), 5))
    axes = plots.effective_rank_heatmap(rank).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == rows
    assert [label.get_text() for label in axes.get_xticklabels()] == columns
    to_png(axes.figure)


def test_equal_inputs_are_one_bar(rank):
    rank.soft = torch.full((8, 30), 8.0)
    heights = [bar.get_height() for bar in plots.effective_rank_histogram(rank).axes[0].patches]
    assert sorted(heights)[-2:] == [0, 30]
