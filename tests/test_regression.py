"""Regression with learned noise: its likelihood, its ELBO under a Trainer, and the commands."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributions import Normal
from transformers import BertForSequenceClassification, TrainingArguments

import bara
from bara.cli import main
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.methods.recipe import TrainRecipe
from conftest import tiny_bert_config, write_jsonl
from helpers import adapt, gradients, stir
from test_elbo import GradientRecorder, assert_same


def two_outputs(logits):
    return {"logits": logits}


def random_logits(n=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, generator=generator), torch.randn(n, generator=generator)


@pytest.mark.parametrize("column", [False, True])
def test_gaussian_nll_is_the_mean_negative_log_density(column):
    logits, labels = random_logits()
    density = Normal(logits[:, 0].double(), logits[:, 1].double().mul(0.5).exp())
    expected = -density.log_prob(labels.double()).mean().float()
    given = labels.unsqueeze(1) if column else labels
    torch.testing.assert_close(bara.gaussian_nll(two_outputs(logits), given), expected)


def test_gaussian_nll_stays_finite_with_its_gradients():
    """At any log-variance, and as the density of the clamped Gaussian where it is too small."""
    logits = torch.tensor([[0.5, -1e4], [0.5, 1e4], [3.0, -10.0]], requires_grad=True)
    labels = torch.tensor([0.5, 0.0, 0.0])
    loss = bara.gaussian_nll(two_outputs(logits), labels)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    exact = torch.tensor([[0.5, -30.0]])
    floor = -Normal(0.5, torch.tensor(-5.0).exp()).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(bara.gaussian_nll(two_outputs(exact), labels[:1]), floor)


def test_gaussian_nll_is_computed_in_float32():
    logits, labels = random_logits()
    low = logits.bfloat16()
    expected = bara.gaussian_nll(two_outputs(low.float()), labels)
    torch.testing.assert_close(bara.gaussian_nll(two_outputs(low), labels), expected)


@pytest.mark.parametrize("shape", [(4, 1), (4, 3), (5, 2)])
def test_gaussian_nll_refuses_other_shapes(shape):
    with pytest.raises(bara.BaraError, match="two outputs per label"):
        bara.gaussian_nll(two_outputs(torch.zeros(shape)), torch.zeros(4))


def regression_bert():
    torch.manual_seed(0)
    config = tiny_bert_config(
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
        problem_type="regression",
    )
    return BertForSequenceClassification(config)


def bayesian(method="bara"):
    options = {"task_type": "SEQ_CLS", "warmup": 0.0, "kl_weight": 0.7, "local_kl_weight": 0.1}
    if method == "bara":
        options["weight_noise"] = 4.0  # the default depends on the steps
        options["head_input_std"] = 0.0  # else a gradient is that of the scaled weight
    return stir(adapt(regression_bert(), method, num_observations=8, **options), 0.1)


def rows(n=8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 20, (n, 6), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randn(n, generator=generator),
    }


def whole_batch_nll(model):
    """The data loss of all eight rows under one draw, from torch's density."""
    batch = rows()
    labels = batch.pop("labels")
    with bara.sampling(model, seed=0):
        logits = model(**batch).logits
    return -Normal(logits[:, 0], logits[:, 1].mul(0.5).exp()).log_prob(labels).mean()


@pytest.mark.parametrize("method", ["bara", "balora"])
def test_trainer_accumulation_does_not_change_the_elbo(method, tmp_path):
    """1 x 8, 2 x 4 and the uneven 3 + 3 + 2 give the gradient of the whole batch's ELBO."""
    model = bayesian(method).train()
    loss = whole_batch_nll(model)
    terms = bara.kl_terms(model)
    kl = 0.7 / 8 * terms["kl_global"] + 0.1 * terms.get("kl_local", 0.0)
    assert kl > 0
    (loss + bara.kl_loss(model)).backward()
    expected = gradients(model)
    for micro, parts in ((8, 1), (4, 2), (3, 3)):
        model = bayesian(method)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=parts,
            max_steps=1,
            max_grad_norm=0,
            learning_rate=0.0,
            train_sampling_strategy="sequential",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = GradientRecorder(
            model,
            arguments,
            train_dataset=Dataset.from_dict({k: v.tolist() for k, v in rows().items()}),
            callbacks=[bara.BayesianCallback()],
            compute_loss_func=bara.elbo_loss(model, bara.gaussian_nll),
        )
        trainer.train()
        assert_same(trainer.recorded, expected, rtol=1e-4, atol=1e-6)
        logged = trainer.state.log_history[0]["loss"]
        assert logged == pytest.approx(loss.item() + kl, rel=1e-4)


def test_elbo_loss_is_the_data_loss_alone_where_there_is_no_kl():
    batch = rows()
    labels = batch.pop("labels")

    def losses(model):
        outputs = model(**batch)
        loss = bara.elbo_loss(model, bara.gaussian_nll)
        return loss(outputs, labels), bara.gaussian_nll(outputs, labels)

    plain = get_peft_model(regression_bert(), LoraConfig(task_type="SEQ_CLS")).train()
    torch.testing.assert_close(*losses(plain))
    model = bayesian().train()
    with_kl, data = losses(model)
    assert with_kl > data
    with torch.no_grad():  # after a training pass, whose KL is still there
        torch.testing.assert_close(*losses(model))
    torch.testing.assert_close(*losses(model.eval()))
    with model.train().disable_adapter():
        torch.testing.assert_close(*losses(model))


def test_elbo_loss_needs_labels():
    model = bayesian()
    with pytest.raises(bara.BaraError, match="no labels"):
        bara.elbo_loss(model, bara.gaussian_nll)(two_outputs(torch.zeros(2, 2)), None)


def test_targets_that_vary_little_around_a_large_mean():
    """In float32 every prediction and every target was the mean, and RMSE was 0."""
    model = bayesian().eval()
    standard = bara.predict(model, rows(), num_draws=3)
    mean, std = 1.7e9, 10.0
    model.config.target_mean, model.config.target_std = mean, std
    found = bara.evaluate(model, rows(), num_draws=3)
    predictive = found.predictive
    torch.testing.assert_close(
        predictive.mean, mean + std * standard.mean.double(), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        predictive.epistemic_variance.float(),
        std**2 * standard.epistemic_variance,
        rtol=1e-4,
        atol=0,
    )
    plain = bara.evaluation.metrics.measure(standard).metrics
    assert found.metrics["rmse"] == pytest.approx(std * plain["rmse"], rel=1e-5)
    assert found.metrics["nll"] == pytest.approx(plain["nll"] + math.log(std), rel=1e-5)
    assert found.metrics["coverage_90"] == plain["coverage_90"]


# --- from a table to intervals ---


QUIET, NOISY = 0.2, 2.0


@pytest.fixture
def model_dir(tmp_path, tiny_tokenizer):
    regression_bert().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def noisy_table(path, seed):
    """Targets around 30 for films, with little noise, and around 34 for food, with much."""
    generator = torch.Generator().manual_seed(seed)
    table = []
    for i, noise in enumerate(torch.randn(128, generator=generator).tolist()):
        word = ("good", "bad", "fine", "poor")[i // 2 % 4]
        if i % 2:
            table.append({"text": f"the food was {word}", "target": 34 + NOISY * noise})
        else:
            table.append({"text": f"a film is {word}", "target": 30 + QUIET * noise})
    return write_jsonl(path, table), table


def test_noise_is_learned_where_it_is(tmp_path, model_dir, capsys):
    """Also through the commands: records, metrics and intervals in the units of the data."""
    train, _ = noisy_table(tmp_path / "train.jsonl", 0)
    test, table = noisy_table(tmp_path / "test.jsonl", 1)
    recipe = TrainRecipe(
        model=str(model_dir),
        data=str(train),
        validation=str(test),
        output=str(tmp_path / "out"),
        method="lora",
        training={"num_train_epochs": 20, "learning_rate": 0.02, "per_device_train_batch_size": 16},
    )
    output = str(finetune(recipe))
    numbers = tmp_path / "numbers.json"
    assert main(["evaluate", output, "--data", str(test), "--json", str(numbers)]) == 0
    metrics = json.loads(numbers.read_text())["metrics"]
    capsys.readouterr()
    assert main(["predict", output, "--data", str(test)]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    column = {key: torch.tensor([record[key] for record in records]) for key in records[0]}
    targets = torch.tensor([row["target"] for row in table])

    food = torch.tensor(["food" in row["text"] for row in table])
    noise = column["aleatoric"].sqrt()
    assert noise[food].min() > 3 * noise[~food].max()
    assert noise[food].mean() == pytest.approx(NOISY, rel=0.5)
    assert noise[~food].mean() == pytest.approx(QUIET, rel=0.75)
    assert column["prediction"][~food].mean() == pytest.approx(30, abs=0.5)
    assert column["prediction"][food].mean() == pytest.approx(34, abs=1)

    # one draw of plain LoRA: the predictive distribution is one Gaussian
    density = Normal(column["prediction"], column["total"].sqrt())
    assert metrics["nll"] == pytest.approx(-density.log_prob(targets).mean().item(), rel=1e-3)
    torch.testing.assert_close(column["epistemic"], torch.zeros(128))
    torch.testing.assert_close(column["lower"], density.icdf(torch.tensor(0.05)), rtol=1e-4, atol=0)
    torch.testing.assert_close(column["upper"], density.icdf(torch.tensor(0.95)), rtol=1e-4, atol=0)
    inside = (column["lower"] <= targets) & (targets <= column["upper"])
    assert metrics["coverage_90"] == pytest.approx(inside.float().mean().item(), abs=1e-6)


def test_a_bayesian_regression_has_both_uncertainties(tmp_path, model_dir, capsys):
    train, _ = noisy_table(tmp_path / "train.jsonl", 0)
    output = str(tmp_path / "out")
    command = ["train", "--model", str(model_dir), "--data", str(train), "--output", output]
    assert main([*command, "--task", "regression", "--epochs", "1"]) == 0
    capsys.readouterr()
    assert main(["predict", output, "--data", str(train)]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for record in records:
        assert record["epistemic"] > 0
        assert record["aleatoric"] > 0
        assert record["total"] == pytest.approx(record["aleatoric"] + record["epistemic"])
        assert record["lower"] < record["prediction"] < record["upper"]
    model, _, task = load_adapter(output)
    assert task.task == "regression"
    assert model.config.num_labels == 2


def test_predict_has_the_least_variance_of_the_training_loss_in_its_units():
    model = regression_bert()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, -20.0]))
    inputs = {k: v for k, v in rows().items() if k != "labels"}
    free = bara.predict(model, inputs).aleatoric_variance
    torch.testing.assert_close(free, torch.full((8,), -20.0).exp())
    model.config.target_mean, model.config.target_std = 5.0, 3.0
    held = bara.predict(model, inputs).aleatoric_variance
    torch.testing.assert_close(held, 9 * torch.full((8,), -10.0).double().exp())
