"""What trackers get through `report_to`, read back from TensorBoard's files."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import bara
from bara.adapter.layer import adapted_layers
from bara.training.loss import rank_terms
from helpers import adapt

pytest.importorskip("tensorboard")


def rows(n):
    ids = torch.randint(5, 20, (n, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        {"input_ids": row, "attention_mask": [1] * 6, "labels": i % 3} for i, row in enumerate(ids)
    ]


def scalars(folder):
    """Everything in the event files: steps and values by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]}


@pytest.fixture
def trained(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    model = adapt(tiny_bert, task_type="SEQ_CLS", target_modules=["query", "value"])
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=2,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="tensorboard",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows(8)),
        eval_dataset=Dataset.from_list(rows(24)),
        compute_metrics=bara.compute_metrics,
        callbacks=[bara.BayesianCallback(num_observations=8)],
    )
    trainer.train()
    return trainer, scalars(tmp_path / "logs")


def test_the_tracker_sees_what_the_trainer_logs(trained):
    trainer, seen = trained
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 3
    for name in ("kl_global", "kl_local", "s_bar", "effective_rank/query", "effective_rank/value"):
        assert seen[f"train/{name}"] == [
            (row["step"], pytest.approx(row[name], rel=1e-5)) for row in logged
        ]
    for row in logged:
        by_type = [row["effective_rank/query"], row["effective_rank/value"]]
        assert row["s_bar"] == pytest.approx(sum(by_type) / 2, rel=1e-5)  # as many layers of each
        assert row["s_bar"] == pytest.approx(row["effective_rank"])


def test_the_curve_of_the_calibration_error(trained):
    trainer, seen = trained
    curve = seen["eval/ece"]
    assert [step for step, _ in curve] == [2, 4, 6]
    model = trainer.model.eval()
    data = rows(24)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"] for row in data])).logits
    labels = torch.tensor([row["labels"] for row in data])
    probs, chosen = logits.softmax(-1).max(-1)
    bins = (probs * 15).ceil().long()  # (0, 1/15], (1/15, 2/15], ...
    ece = sum(
        (bins == b).float().mean()
        * (chosen.eq(labels)[bins == b].float().mean() - probs[bins == b].mean()).abs()
        for b in bins.unique()
    )
    assert curve[-1][1] == pytest.approx(ece.item(), abs=1e-5)
    assert seen["eval/nll"][-1][1] == pytest.approx(
        F.cross_entropy(logits, labels).item(), rel=1e-5
    )


def test_the_rank_of_a_kind_of_layer_is_its_layers_mean(tiny_bert):
    """Global gates alone: P(z_k > 0) of each factor, summed, has no input in it."""
    options = {"local_gate": False, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    model = adapt(tiny_bert, **options).train()
    with torch.no_grad():
        for i, (_, _, posterior) in enumerate(adapted_layers(model, "default")):
            posterior.global_logit += 0.005 * i
    batch = {k: torch.tensor([row[k] for row in rows(4)]) for k in ("input_ids", "labels")}
    model(**batch)
    terms = rank_terms(model)
    for kind in ("query", "value"):
        ranks = []
        for name, _, posterior in adapted_layers(model, "default"):
            if name.endswith(kind):
                # hard concrete: P(z > 0) = sigmoid(logit - temperature log(0.1 / 1.1))
                shift = 0.66 * torch.log(torch.tensor(0.1 / 1.1))
                ranks.append((100 * posterior.global_logit - shift).sigmoid().sum())
        assert terms[f"effective_rank/{kind}"] == pytest.approx(
            torch.stack(ranks).mean().item(), rel=1e-4
        )
    assert terms["effective_rank/query"] != pytest.approx(terms["effective_rank/value"], rel=1e-4)


def test_metrics_of_other_shapes():
    class Prediction:
        predictions = torch.tensor([[0.5, -1.0], [2.0, 0.3], [0.1, 0.2]]).numpy()
        label_ids = torch.tensor([0.4, 1.0, 0.0]).numpy()

    mean, log_var = torch.tensor(Prediction.predictions).unbind(1)
    found = bara.compute_metrics(Prediction())
    normal = torch.distributions.Normal(mean, (log_var / 2).exp())
    expected = -normal.log_prob(torch.tensor(Prediction.label_ids)).mean()
    assert found["nll"] == pytest.approx(expected.item(), rel=1e-5)

    class Language:
        predictions = torch.zeros(2, 3, 5).numpy()
        label_ids = torch.zeros(2, 3, dtype=torch.long).numpy()

    with pytest.raises(bara.BaraError, match=r"not for logits \(2, 3, 5\)"):
        bara.compute_metrics(Language())
