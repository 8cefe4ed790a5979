"""Streams without a length, and losses that `Trainer` computes itself."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import bara
from bara.methods.table import METHODS
from helpers import adapt, stir, tiny_llama


def rows(count=10, tokens=False):
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        ids = torch.randint(5, 20, (3 + i % 4,), generator=generator).tolist()
        labels = ids if tokens else i % 3
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return found


def pad(items):
    from bara.prediction.batches import pad_rows

    return pad_rows(items)


def trainer(kind, model, folder, data, **options):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return kind(
        model,
        arguments,
        train_dataset=data,
        data_collator=pad,
        callbacks=[bara.BayesianCallback()],
    )


def classifier(tiny_bert, **options):
    return stir(adapt(tiny_bert, task_type="SEQ_CLS", num_observations=None, **options), 0.1)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_stream_is_predicted_as_its_rows_are(batch_size, tiny_bert):
    model = classifier(tiny_bert).eval()
    data = Dataset.from_list(rows())
    options = {"num_draws": 3, "seed": 1, "batch_size": batch_size, "progress": False}
    expected = bara.predict(model, data, **options)
    for stream in (data.to_iterable_dataset(), iter(rows())):
        actual = bara.predict(model, stream, **options)
        torch.testing.assert_close(actual.probs, expected.probs)
        assert torch.equal(actual.labels, expected.labels)
    evaluation = bara.evaluate(model, data.to_iterable_dataset(), **options)
    assert evaluation.metrics == pytest.approx(bara.evaluate(model, data, **options).metrics)
    rank = bara.effective_rank(model, data.to_iterable_dataset(), progress=False)
    torch.testing.assert_close(rank.soft, bara.effective_rank(model, data, progress=False).soft)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter(()), "The data set is empty"),
        (iter(["text"]), "tokenise it first"),
        (iter([{"text": "a text"}]), "tokenise it first"),
        ("a text", "tokenise it first"),
        (7, "data must be"),
    ],
)
def test_what_is_no_stream_of_rows(data, message, tiny_bert):
    with pytest.raises(bara.BaraError, match=message):
        bara.predict(classifier(tiny_bert), data, progress=False)


def test_n_of_a_stream_is_what_training_takes_of_it(tmp_path, tiny_bert):
    model = classifier(tiny_bert)
    data = Dataset.from_list(rows(40)).to_iterable_dataset()
    job = trainer(Trainer, model, tmp_path, data, max_steps=3, gradient_accumulation_steps=2)
    with pytest.warns(UserWarning, match="N is what 3 steps take: 12 examples"):
        job.train()
    assert model.peft_config["default"].resolved.num_observations == 12


def test_n_of_a_stream_of_texts_counts_label_tokens(tmp_path):
    model = adapt(tiny_llama(), task_type="CAUSAL_LM", num_observations=None)
    every = rows(8, tokens=True)
    data = Dataset.from_list(every).to_iterable_dataset()
    job = trainer(Trainer, model, tmp_path, data, max_steps=4)
    with pytest.warns(UserWarning, match="label tokens"):
        job.train()
    # the eight rows, each without its first token: nothing predicts it
    expected = sum(len(row["labels"]) - 1 for row in every)
    assert model.peft_config["default"].resolved.num_observations == expected


class Mixed(bara.KLMixin, Trainer):
    """Has the KL in `compute_loss` without being trained."""


def smoothed(logits, labels, factor):
    log_probs = logits.log_softmax(-1)
    nll = -log_probs.gather(1, labels.unsqueeze(1)).mean()
    return (1 - factor) * nll - factor * log_probs.mean()


@pytest.mark.parametrize("kind", [Mixed, METHODS["bara"].trainer])
def test_label_smoothing_keeps_the_kl(kind, tmp_path, tiny_bert):
    model = classifier(tiny_bert, warmup=0.0).train()
    model.peft_config["default"].num_observations = 10
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    job = trainer(kind, model, tmp_path, Dataset.from_list(rows()), label_smoothing_factor=0.1)
    batch = pad(rows(4))
    torch.manual_seed(3)
    loss = job.compute_loss(model, dict(batch))
    terms = bara.kl_terms(model)
    torch.manual_seed(3)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    resolved = model.peft_config["default"].resolved
    kl = resolved.kl_weight / 10 * terms["kl_global"] + resolved.local_kl_weight * terms["kl_local"]
    assert kl > 0.01
    expected = smoothed(logits, batch["labels"], 0.1) + kl
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    job.callback_handler.on_pre_optimizer_step(job.args, job.state, job.control)


class Weighted(Trainer):
    """Class weights, with labels that the model sees or does not."""

    hide = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels") if self.hide else inputs["labels"]
        outputs = model(**inputs)
        weight = torch.tensor([1.0, 2.0, 3.0])
        loss = torch.nn.functional.cross_entropy(outputs["logits"], labels, weight)
        return (loss, outputs) if return_outputs else loss


class Seeing(Weighted):
    hide = False


def test_a_loss_beside_the_models_own_stops_before_the_first_step(tmp_path, tiny_bert):
    """The KL is in `outputs.loss`, which the trainer leaves aside."""
    model = classifier(tiny_bert)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    job = trainer(Seeing, model, tmp_path, Dataset.from_list(rows()), max_steps=3)
    with pytest.raises(bara.BaraError, match=r"without the prior.*give the model no labels"):
        job.train()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_the_mixin_gives_class_weights_their_kl(tmp_path, tiny_bert):
    class MixedWeighted(bara.KLMixin, Weighted):
        pass

    model = classifier(tiny_bert)
    job = trainer(MixedWeighted, model, tmp_path, Dataset.from_list(rows()), max_steps=3)
    job.train()
    assert job.state.global_step == 3


def test_plain_lora_trains_as_ever_in_the_same_trainer(tmp_path, tiny_bert):
    from peft import LoraConfig

    model = get_peft_model(tiny_bert, LoraConfig(task_type="SEQ_CLS"))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], label_smoothing_factor=0.1
    )
    data = Dataset.from_list(rows())
    METHODS["lora"].trainer(model, arguments, train_dataset=data, data_collator=pad).train()
