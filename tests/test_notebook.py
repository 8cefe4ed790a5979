"""Cells of a notebook in the order in which people run them: what works with LoRA works, or says
what to do."""

import datetime

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

import bara
from bara.adapter.elbo import elbo_of
from helpers import adapt

ROWS = [
    {"input_ids": torch.arange(5, 11) + i % 4, "attention_mask": torch.ones(6), "labels": i % 2}
    for i in range(12)
]


def adapted(base, **options):
    return adapt(base, task_type="SEQ_CLS", target_modules=["query", "value"], **options)


def trainer(model, tmp_path, rows=ROWS, callbacks=(), cls=Trainer, **options):
    arguments = TrainingArguments(
        str(tmp_path),
        **{"max_steps": 2, "logging_steps": 1} | options,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    return cls(model, arguments, train_dataset=rows, callbacks=list(callbacks))


class Distilling(Trainer):
    """Stays near the base model, whose outputs it computes with gradients and throws them away."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        out = model(**inputs)
        with model.disable_adapter():
            base = model(**inputs).logits.detach()
        loss = cross_entropy(out.logits, labels) + (out.logits - base).square().mean()
        return (loss, out) if return_outputs else loss


def test_a_pass_without_the_adapter_does_not_take_the_kl_away(tiny_bert, tmp_path):
    model = adapted(tiny_bert, num_observations=None, warmup=0.0)
    of_trainer = trainer(model, tmp_path, callbacks=[bara.BayesianCallback()], cls=Distilling)
    of_trainer.train()
    logged = [row for row in of_trainer.state.log_history if "loss" in row]
    assert len(logged) == 2
    assert all(row["kl_global"] > 0 for row in logged)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_training_that_was_stopped_leaves_no_progress_behind(tiny_bert, tmp_path):
    model = adapted(tiny_bert, num_observations=None)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, callbacks=[bara.BayesianCallback(), Stop()], max_steps=100).train()
    assert elbo_of(model).progress is None
    with pytest.warns(UserWarning, match="does not know how far training is"):
        trainer(model, tmp_path).train()  # the callback forgotten


def test_a_mistake_is_said_once_and_the_mended_cell_runs(tiny_bert):
    model = adapted(tiny_bert, num_observations=12, warmup=0.0).train()
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in ROWS])}
    labels = torch.tensor([row["labels"] for row in ROWS])
    cross_entropy(model(**inputs).logits, labels).backward()
    with pytest.raises(bara.BaraError, match="not its KL"):
        model(**inputs)
    (cross_entropy(model(**inputs).logits, labels) + bara.kl_loss(model)).backward()
    model(**inputs)


@pytest.mark.parametrize("again", [bara.BaraConfig, LoraConfig])
def test_a_second_adapter_on_one_base_model(tiny_bert, again):
    options = {"r": 4, "task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    model = get_peft_model(tiny_bert, bara.BaraConfig(**options))
    with pytest.warns(UserWarning, match="second time"), pytest.raises(bara.BaraError) as error:
        get_peft_model(tiny_bert, again(**options))
    assert "'default' already: call unload()" in str(error.value)
    get_peft_model(model.unload(), again(**options))


def test_n_of_an_adapter_that_is_not_trained_stays(tiny_bert, tmp_path):
    model = adapted(tiny_bert, num_observations=None)
    trainer(model, tmp_path, callbacks=[bara.BayesianCallback()]).train()
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    trainer(model, tmp_path, rows=ROWS[:4], callbacks=[bara.BayesianCallback()]).train()
    counted = {n: a.resolved.num_observations for n, a in elbo_of(model).adapters.items()}
    assert counted == {"default": 12, "second": 4}


class Once(torch.utils.data.IterableDataset):
    def __init__(self):
        self.rows = iter(ROWS * 2)

    def __iter__(self):
        return self.rows


def test_a_stream_that_can_be_read_once_is_not_looked_at(tiny_bert, tmp_path):
    model = adapted(tiny_bert, num_observations=None)
    with pytest.raises(bara.BaraError, match="num_observations"):
        trainer(model, tmp_path, rows=Once(), callbacks=[bara.BayesianCallback()]).train()
    callback = bara.BayesianCallback(num_observations=12)
    of_trainer = trainer(
        model,
        tmp_path,
        rows=Once(),
        callbacks=[callback],
        max_steps=3,
        per_device_train_batch_size=8,
    )
    with pytest.warns(UserWarning, match="can be read only once"):
        of_trainer.train()
    assert of_trainer.state.global_step == 3  # all 24 rows


class Synthetic(torch.utils.data.Dataset):
    """Made by number, for any number: it ends by its length alone."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return ROWS[i % 12]


def test_data_sets_that_trainer_takes_are_predicted(tiny_bert):
    model = adapted(tiny_bert)
    expected = bara.predict(model, ROWS, progress=False).probs

    def probs(data):
        return bara.predict(model, data, progress=False).probs

    torch.testing.assert_close(probs(Synthetic()), expected)
    plain = {name: [torch.as_tensor(row[name]).tolist() for row in ROWS] for name in ROWS[0]}
    others = {
        "tokens": [["a", "b"]] * 12,
        "meta": [{"a": 1}] * 12,
        "when": [datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)] * 12,
        "offset_mapping": [[[0, 1]] * (1 + i % 3) for i in range(12)],
    }
    torch.testing.assert_close(probs(Dataset.from_dict(plain | others)), expected)
    made = Dataset.from_dict({"place": list(range(12))})
    made.set_transform(
        lambda batch: {name: [values[i] for i in batch["place"]] for name, values in plain.items()}
    )
    torch.testing.assert_close(probs(made), expected)


def test_a_batch_without_a_row(tiny_bert):
    with pytest.raises(bara.BaraError, match="The batch is empty"):
        bara.predict(adapted(tiny_bert), {"input_ids": torch.zeros(0, 6, dtype=torch.long)})


def test_parts_in_evaluation_mode_stay_there(tiny_bert):
    model = adapted(tiny_bert).train()
    frozen = model.base_model.model.bert.embeddings
    frozen.eval()
    bara.predict(model, ROWS, progress=False)
    assert model.training
    assert not any(module.training for module in frozen.modules())
    assert model.base_model.model.bert.encoder.training
