"""Several labels for each input, against explicit sums over draws and scikit-learn."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from sklearn.metrics import f1_score, hamming_loss
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import BertForSequenceClassification

import bara
from bara import BaraError, MultiLabelPredictive
from bara.evaluation.metrics import selection
from bara.prediction.temperature import fit_temperature, negative_log_likelihood
from bara.training.callback import count_observations
from conftest import tiny_bert_config
from helpers import adapt, stir

S, N, L = 4, 6, 3


@pytest.fixture
def predictive() -> MultiLabelPredictive:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(S, N, L, generator=generator)
    labels = torch.randint(0, 2, (N, L), generator=generator).float()
    return MultiLabelPredictive(logits, labels, ("a", "b", "c"))


def explicit(predictive: MultiLabelPredictive) -> list[list[list[float]]]:
    return predictive.logits_draws.double().sigmoid().tolist()


def entropy(p: float) -> float:
    return -sum(q * math.log(q) for q in (p, 1 - p))


def test_labels_are_the_mean_over_draws_and_uncertainty_splits(predictive):
    draws = explicit(predictive)
    for i in range(N):
        for label in range(L):
            each = [draw[i][label] for draw in draws]
            mean = sum(each) / S
            aleatoric = sum(map(entropy, each)) / S
            assert predictive.probs[i, label].item() == pytest.approx(mean, abs=1e-6)
            assert predictive.prediction[i, label].item() == (mean > 0.5)
            assert predictive.total_uncertainty[i, label].item() == pytest.approx(
                entropy(mean), abs=1e-5
            )
            assert predictive.aleatoric_uncertainty[i, label].item() == pytest.approx(
                aleatoric, abs=1e-5
            )
            assert predictive.epistemic_uncertainty[i, label].item() == pytest.approx(
                entropy(mean) - aleatoric, abs=1e-5
            )


def together(draws, i, labels) -> float:
    """Probability of all labels of an input: labels are independent under a draw only."""
    return (
        sum(
            math.prod(p if y else 1 - p for p, y in zip(draw[i], labels, strict=True))
            for draw in draws
        )
        / S
    )


def test_the_labels_of_an_input_have_one_probability_together(predictive):
    draws = explicit(predictive)
    for i in range(N):
        right, predicted = predictive.labels[i].tolist(), predictive.prediction[i].tolist()
        assert predictive.log_prob(predictive.labels)[i].exp().item() == pytest.approx(
            together(draws, i, right), abs=1e-6
        )
        assert predictive.confidence[i].item() == pytest.approx(
            together(draws, i, predicted), abs=1e-6
        )


def joint(predictive: MultiLabelPredictive, i: int) -> tuple[float, float]:
    """Entropy of the label sets of an input under the mixture, and its mean under the draws, by
    counting all sets."""
    draws = explicit(predictive)
    sets = list(product((0, 1), repeat=predictive.num_labels))
    under = [[together([draw], i, labels) * S for labels in sets] for draw in draws]
    mixed = [sum(same) / S for same in zip(*under, strict=True)]

    def entropy_of(probabilities):
        return -sum(p * math.log(p) for p in probabilities if p > 0)

    return entropy_of(mixed), sum(map(entropy_of, under)) / S


def test_the_labels_of_an_input_have_one_uncertainty_together(predictive):
    for i in range(N):
        total, aleatoric = joint(predictive, i)
        assert predictive.joint_total_uncertainty[i].item() == pytest.approx(total, abs=1e-5)
        assert predictive.joint_aleatoric_uncertainty[i].item() == pytest.approx(
            aleatoric, abs=1e-5
        )
        assert predictive.joint_epistemic_uncertainty[i].item() == pytest.approx(
            total - aleatoric, abs=1e-5
        )
    one = MultiLabelPredictive(predictive.logits_draws[:, :, :1])
    torch.testing.assert_close(one.joint_total_uncertainty, one.total_uncertainty[:, 0])


def test_of_many_labels_it_is_estimated_from_sets_that_are_drawn():
    """Of 12 labels all 4,096 sets can be counted here, and the estimate compared with them."""
    logits = torch.randn(S, 40, 12, generator=torch.Generator().manual_seed(1))
    predictive = MultiLabelPredictive(logits)
    exact = [total - aleatoric for total, aleatoric in (joint(predictive, i) for i in range(5))]
    assert min(exact) > 0.3
    estimate = predictive.joint_epistemic_uncertainty
    assert estimate[:5].tolist() == pytest.approx(exact, abs=0.1)
    assert estimate[:5].tolist() != pytest.approx(exact, abs=1e-4)
    alone = predictive.select([3]).joint_epistemic_uncertainty
    assert alone.tolist() == pytest.approx([estimate[3].item()])
    agreed = MultiLabelPredictive(logits[:1].expand(S, -1, -1))
    assert agreed.joint_epistemic_uncertainty.abs().max() < 1e-6
    torch.testing.assert_close(
        agreed.joint_total_uncertainty, agreed.aleatoric_uncertainty.sum(-1), atol=1e-5, rtol=0
    )
    certain = MultiLabelPredictive(torch.full((S, 2, 12), -math.inf))
    assert certain.joint_total_uncertainty.tolist() == [0, 0]


def test_metrics_of_a_single_label():
    logits, labels = (
        torch.tensor([[[2.0], [-1.0], [0.5], [3.0]]]),
        torch.tensor([[1], [1], [0], [1]]),
    )
    found = bara.evaluation.metrics.measure(MultiLabelPredictive(logits, labels)).to_dict()
    right, predicted = labels.numpy(), (logits[0] > 0).int().numpy()
    assert found["hamming"] == pytest.approx(hamming_loss(right, predicted))
    assert found["f1_micro"] == found["f1_macro"] == pytest.approx(f1_score(right, predicted))
    assert found["nll"] == pytest.approx(found["label_nll"])


def test_metrics_are_those_of_scikit_learn_and_of_sums(predictive):
    metrics = bara.evaluation.metrics.measure(predictive)
    right, predicted = predictive.labels.int().numpy(), predictive.prediction.int().numpy()
    draws = explicit(predictive)
    found = metrics.to_dict()
    assert found["hamming"] == pytest.approx(hamming_loss(right, predicted))
    for average in ("micro", "macro"):
        assert found[f"f1_{average}"] == pytest.approx(
            f1_score(right, predicted, average=average, zero_division=0)
        )
    assert found["subset_accuracy"] == pytest.approx((right == predicted).all(1).mean())
    nll = -sum(math.log(together(draws, i, right[i])) for i in range(N)) / N
    assert found["nll"] == pytest.approx(nll, abs=1e-5)
    for label, name in enumerate("abc"):
        scores, y = metrics.by_label[name], right[:, label]
        p = [sum(draw[i][label] for draw in draws) / S for i in range(N)]
        assert scores["frequency"] == pytest.approx(y.mean())
        assert scores["brier"] == pytest.approx(
            sum((a - b) ** 2 for a, b in zip(p, y, strict=True)) / N, abs=1e-6
        )
        assert scores["nll"] == pytest.approx(
            -sum(math.log(a if b else 1 - a) for a, b in zip(p, y, strict=True)) / N, abs=1e-5
        )
        bins: dict[int, list[tuple[float, int]]] = {}
        for a, b in zip(p, y, strict=True):
            bins.setdefault(int(a * 15), []).append((a, b))
        ece = sum(abs(sum(a - b for a, b in pairs)) for pairs in bins.values()) / N
        assert scores["ece"] == pytest.approx(ece, abs=1e-5)
    assert found["ece"] == pytest.approx(sum(s["ece"] for s in metrics.by_label.values()) / L)
    uncertainty, errors = selection(predictive)
    torch.testing.assert_close(uncertainty, 1 - predictive.confidence)
    assert errors.tolist() == [float((right[i] != predicted[i]).any()) for i in range(N)]


def test_records_and_the_table_name_every_label(predictive):
    record = predictive.to_records()[0]
    assert list(record["labels"]) == ["a", "b", "c"]
    assert record["labels"]["b"]["probability"] == predictive.probs[0, 1].item()
    for part in ("total", "aleatoric", "epistemic"):
        expected = getattr(predictive, f"joint_{part}_uncertainty")[0].item()
        assert record[part] == pytest.approx(expected)
    frame = predictive.to_frame()
    assert len(frame) == N * L
    assert frame["name"].tolist() == ["a", "b", "c"] * N
    assert frame["label"].tolist() == predictive.labels.flatten().bool().tolist()
    assert frame["epistemic"].tolist() == predictive.epistemic_uncertainty.flatten().tolist()
    assert len(predictive.select([1, 3]).to_frame()) == 2 * L


def test_a_temperature_is_the_best_for_the_labels_together(predictive):
    flipped = predictive.prediction.clone()
    flipped[0] = ~flipped[0]  # else the best temperature is the least
    predictive = MultiLabelPredictive(predictive.logits_draws, flipped.float())
    best = fit_temperature(predictive)
    assert 0.1 < best < 10
    losses = [negative_log_likelihood(predictive, best * f).item() for f in (0.98, 1.0, 1.02)]
    assert losses[1] <= min(losses[0], losses[2])
    assert negative_log_likelihood(predictive).item() == pytest.approx(
        -predictive.log_prob(predictive.labels).mean().item(), abs=1e-5
    )


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), None, "draws, inputs, labels"),
        (torch.zeros(1, 2, 2), torch.zeros(2), "labels must have the shape"),
        (torch.zeros(1, 2, 2), torch.full((2, 2), 0.5), "must be 0 or 1"),
    ],
)
def test_what_makes_no_sense_is_refused(logits, labels, message):
    with pytest.raises(BaraError, match=message):
        MultiLabelPredictive(logits, labels)


@pytest.fixture
def model():
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = tiny_bert_config(num_labels=L, **dropout)
    config.problem_type = "multi_label_classification"
    return stir(adapt(BertForSequenceClassification(config), task_type="SEQ_CLS"))


def batch(rows: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": torch.randint(5, 20, (rows, 7), generator=generator),
        "attention_mask": torch.ones(rows, 7, dtype=torch.long),
        "labels": torch.randint(0, 2, (rows, L), generator=generator).float(),
    }


def test_predict_is_the_model_under_its_draws(model):
    data = batch()
    predictive = bara.predict(model, data, num_draws=3, seed=1)
    inputs = {name: value for name, value in data.items() if name != "labels"}
    for draw in range(3):
        with torch.no_grad(), bara.sampling(model.eval(), seed=1, first_draw=draw):
            logits = model(**inputs).logits
        torch.testing.assert_close(predictive.logits_draws[draw], logits, atol=1e-5, rtol=1e-4)
    assert predictive.labels.tolist() == data["labels"].tolist()


def test_the_loss_is_the_elbo_per_label(model):
    """The model's own loss is a mean over the labels, so that the KL is divided by their number."""
    data = batch()
    model.train()
    with bara.sampling(model, seed=3):
        loss = model(**data).loss
        labels = data.pop("labels")
        logits = model(**data).logits
        kl = bara.kl_loss(model)
    nll = binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1).mean()
    assert kl > 0
    torch.testing.assert_close(L * loss, nll + kl, rtol=1e-5, atol=1e-5)


def test_inputs_are_what_is_counted(model, tmp_path):
    from torch.utils.data import DataLoader
    from transformers import TrainingArguments

    rows = [{name: value[i] for name, value in batch().items()} for i in range(5)]
    loader = DataLoader(rows, batch_size=2)
    assert count_observations(loader, model, 3, TrainingArguments(str(tmp_path))) == 5
