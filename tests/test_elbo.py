"""The KL reaches the loss with the same weight however the training loop is built."""

import copy
import gc
import os
import subprocess
import sys
import textwrap
import warnings
import weakref

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import bara
from helpers import (
    CONFIGS,
    TinyConv,
    TinyNet,
    adapt,
    gradients,
    layer_posterior,
    stir,
    tiny_gpt2,
    tiny_llama,
)

METHODS = list(CONFIGS)
WITH_KL = [method for method in METHODS if method != "mc-dropout"]


def net(method="bara", **options):
    torch.manual_seed(0)
    model = adapt(TinyNet(), method, target_modules=["layer"], **options)
    return stir(model).train()


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    assert first
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=name, **tolerance)


def batch(n=8):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 6, generator=generator), torch.randn(n, 5, generator=generator)


def test_the_loss_is_data_plus_weighted_kl():
    model = net(kl_weight=0.7, local_kl_weight=0.02)
    x, y = batch()
    with bara.sampling(model, seed=0):
        output = model(x=x, labels=y)
    terms = bara.kl_terms(model)
    data = (output["logits"] - y).square().mean()
    expected = data + 0.7 / 50 * terms["kl_global"] + 0.02 * terms["kl_local"]
    torch.testing.assert_close(output["loss"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 3, 48])
def test_left_alone_more_than_36_layers_share_kl_and_noise(num_layers):
    torch.manual_seed(0)
    base = tiny_llama(num_hidden_layers=num_layers)
    model = adapt(base, task_type="CAUSAL_LM", target_modules=["q_proj"], warmup=0.0)
    posterior = layer_posterior(model)[1]
    alpha = torch.exp(100 * posterior.noise_logit.detach()).tolist()
    stir(model).train()
    ids = torch.arange(12).reshape(2, 6) + 1
    with bara.sampling(model, seed=0):
        outputs = model(input_ids=ids, labels=ids)
    terms = bara.kl_terms(model)
    logits = outputs.logits[:, :-1].flatten(0, 1)
    data = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    share = {1: 1.0, 3: 1.0, 48: 0.75}[num_layers]
    assert model.peft_config["default"].resolved.weight_noise == 4.0 * share
    assert alpha == pytest.approx([0.5 * share] * 4)
    expected = data + share * (terms["kl_global"] / (6 * 50) + 0.001 * terms["kl_local"])
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-5, atol=1e-5)


def test_left_alone_convolutions_have_a_tenth_of_the_kl_and_all_of_the_noise():
    for targets, part in ((["conv"], 0.1), (["conv", "head"], 0.55), (["head"], 1.0)):
        model = adapt(TinyConv(), target_modules=targets)
        resolved = model.peft_config["default"].resolved
        assert resolved.kl_weight == pytest.approx(part / 6)
        assert resolved.local_kl_weight == pytest.approx(part * 0.001)
        assert (resolved.weight_noise, resolved.init_noise) == (4.0, 0.5)


def test_kl_loss_gives_the_same_step_for_a_loss_of_ones_own():
    x, y = batch()
    steps = []
    for own in (False, True):
        model = net(local_kl_weight=0.1)
        with bara.sampling(model, seed=0):
            if own:
                loss = (model(x=x)["logits"] - y).square().mean() + bara.kl_loss(model)
            else:
                loss = model(x=x, labels=y)["loss"]
        loss.backward()
        steps.append(gradients(model))
    assert_same(*steps)


def test_evaluation_losses_hold_no_kl():
    model = net()
    x, y = batch()
    for loss in (model.eval()(x=x, labels=y), inference(model.train(), x, y)):
        data = (loss["logits"] - y).square().mean()
        torch.testing.assert_close(loss["loss"], data)


@torch.no_grad()
def inference(model, x, y):
    return model(x=x, labels=y)


def test_warm_up_scales_the_kl():
    model = net(warmup=0.5)
    x, _ = batch()
    values = []
    for progress in (0.0, 0.2, 0.35, 0.5, 1.0):
        bara.set_progress(model, progress)
        model(x=x)
        values.append(bara.kl_loss(model).item())
    assert values[:2] == [0, 0]
    assert values[2] == pytest.approx(values[3] / 2, rel=1e-5)
    assert values[3] == pytest.approx(values[4], rel=1e-5)


@pytest.mark.parametrize(("num_steps", "noise"), [(1, 0.0), (40, 0.0), (80, 2.0), (9999, 4.0)])
def test_the_default_noise_grows_with_the_number_of_steps(num_steps, noise):
    model = net()
    assert model.peft_config["default"].resolved.weight_noise == 4
    bara.set_progress(model, 0.0, num_steps)
    assert model.peft_config["default"].resolved.weight_noise == noise


def test_noise_that_was_given_or_stands_alone_or_belongs_to_a_frozen_adapter_stays():
    off = {"global_gate": False, "local_gate": False, "factor_noise": False}
    for options, noise in (({"weight_noise": 1.5}, 1.5), (off, 4.0)):
        model = net(**options)
        bara.set_progress(model, 0.0, 1)
        assert model.peft_config["default"].resolved.weight_noise == noise
    model = net()
    model.add_adapter("second", bara.BaraConfig(r=2, target_modules=["layer"]))
    model.set_adapter("second")
    bara.set_progress(model, 0.0, 1)
    assert model.peft_config["default"].resolved.weight_noise == 4
    assert model.peft_config["second"].resolved.weight_noise == 0
    with pytest.raises(bara.BaraError, match="num_steps must be at least 1, got 0"):
        bara.set_progress(model, 0.0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_of_eight_equals_two_of_four(method):
    """Under fixed draws, in a plain loop that divides each loss by the number of batches."""
    x, y = batch()
    steps = []
    for parts in (1, 2):
        model = net(method, local_kl_weight=0.1)
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with bara.sampling(model, seed=0):
                (model(x=xs, labels=ys)["loss"] / parts).backward()
        steps.append(gradients(model))
    assert_same(*steps, rtol=1e-4, atol=1e-6)


class GradientRecorder(Trainer):
    """Keeps the gradient that the first optimiser step sees, under one fixed draw."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        with bara.sampling(model, seed=0):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.recorded = gradients(model)
        return loss


def trainer_step(model, dataset, tmp_path, micro, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=8 // micro,
        max_steps=1,
        max_grad_norm=0,
        learning_rate=0.0,
        train_sampling_strategy="sequential",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )
    trainer = GradientRecorder(
        model, arguments, train_dataset=dataset, callbacks=[bara.BayesianCallback()]
    )
    trainer.train()
    return trainer


def classification_rows(n=8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 20, (n, 6), generator=generator)
    return Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "attention_mask": torch.ones_like(ids).tolist(),
            "labels": torch.randint(0, 3, (n,), generator=generator).tolist(),
        }
    )


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def test_trainer_accumulation_does_not_change_the_elbo_of_a_classifier(tiny_bert, tmp_path):
    """BERT's loss ignores num_items_in_batch: 1 x 8 and 2 x 4 must agree all the same."""
    steps = []
    for micro in (8, 4, 2):
        model = stir(adapt(copy.deepcopy(tiny_bert), task_type="SEQ_CLS", warmup=0.0))
        without_dropout(model)
        steps.append(trainer_step(model, classification_rows(), tmp_path, micro).recorded)
    assert_same(steps[0], steps[1], rtol=1e-4, atol=1e-6)
    assert_same(steps[0], steps[2], rtol=1e-4, atol=1e-6)


def language_rows():
    generator = torch.Generator().manual_seed(0)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for length in (3, 8, 5, 8, 2, 7, 8, 4):
        ids = torch.randint(1, 64, (8,), generator=generator).tolist()
        rows["input_ids"].append(ids)
        rows["attention_mask"].append([1] * 8)
        rows["labels"].append([-100] * (8 - length) + ids[8 - length :])
    return Dataset.from_dict(rows)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_trainer_accumulation_does_not_change_the_elbo_of_a_language_model(make, tmp_path):
    """Micro-batches with different numbers of label tokens, weighted by tokens."""
    steps = []
    for micro in (8, 4):
        model = stir(adapt(make(), task_type="CAUSAL_LM", warmup=0.0, local_kl_weight=0.1), 0.1)
        trainer = trainer_step(model, language_rows(), tmp_path, micro)
        steps.append(trainer.recorded)
        # the first label of a row is never predicted
        counted = sum(min(length, 7) for length in (3, 8, 5, 8, 2, 7, 8, 4))
        assert model.peft_config["default"].resolved.num_observations == counted
    assert_same(*steps, rtol=1e-3, atol=1e-6)


def test_language_model_loss_with_num_items_is_the_token_sum_over_it():
    model = stir(adapt(tiny_llama(), task_type="CAUSAL_LM", kl_weight=0.0, local_kl_weight=0.0))
    model.train()
    rows = language_rows().with_format("torch")[:]
    with bara.sampling(model, seed=0):
        output = model(**rows, num_items_in_batch=torch.tensor(123))
    logits, labels = output.logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / 123
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)


def tiny_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2}
    config = T5Config(vocab_size=20, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", ["bert", "llama", "t5"])
def test_gradient_checkpointing_changes_nothing(method, make, tiny_bert):
    """Same loss, KL and gradients with and without, fresh noise and padding included."""
    makers = {"bert": lambda: copy.deepcopy(tiny_bert), "llama": tiny_llama, "t5": tiny_t5}
    task = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[make]
    # T5's cross-attention layers all read one tensor, from regions that are checkpointed apart
    targets = {"target_modules": r".*(encoder.*\.q|EncDecAttention\.(k|v))"} if make == "t5" else {}
    labels = torch.randint(1, 20, (2, 6), generator=torch.Generator().manual_seed(1))
    if make == "bert":
        labels = torch.tensor([0, 2])
    ids = torch.randint(5, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    results = []
    for checkpointing in (False, True):
        options = {"task_type": task, "local_kl_weight": 0.1, **targets}
        model = stir(adapt(makers[make](), method, **options), 0.1)
        if checkpointing:
            model.gradient_checkpointing_enable()
        without_dropout(model).train()
        torch.manual_seed(5)
        first = model(input_ids=ids, attention_mask=mask, labels=labels)
        # a second pass with another mask before the first is differentiated
        torch.manual_seed(6)
        second = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        (first.loss + second.loss).backward()
        results.append((first.loss.detach(), second.loss.detach(), gradients(model)))
    torch.testing.assert_close(results[0][:2], results[1][:2])
    assert_same(results[0][2], results[1][2], rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_refused():
    model = adapt(tiny_llama(), task_type="CAUSAL_LM")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    model.train()
    ids = torch.randint(1, 64, (2, 6))
    with pytest.raises(bara.BaraError, match="use_reentrant"):
        model(input_ids=ids, labels=ids)


def test_training_without_n_stops():
    model = net(num_observations=None)
    x, y = batch()
    with pytest.raises(bara.BaraError, match=r"num_observations.*BayesianCallback"):
        model(x=x, labels=y)
    model.eval()(x=x, labels=y)  # predicting needs no N
    model.train()
    with torch.no_grad():
        model(x=x, labels=y)


def test_forgetting_the_kl_stops_the_next_step():
    model = net()
    x, y = batch()
    (model(x=x)["logits"] - y).square().mean().backward()
    with pytest.raises(bara.BaraError, match="plain LoRA"):
        model(x=x)


def test_a_warm_up_that_never_hears_of_progress_warns_once():
    model = net()
    x, y = batch()
    with pytest.warns(UserWarning, match="set_progress"):
        model(x=x, labels=y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x=x, labels=y)


def test_steps_that_used_the_kl_go_on():
    model = net(warmup=0.0)
    x, y = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x=x, labels=y)["loss"].backward()
        ((model(x=x)["logits"] - y).square().mean() + bara.kl_loss(model)).backward()
        model(x=x)  # not differentiated at all
        model(x=x, labels=y)["loss"].backward()
        model.eval()(x=x)


def test_counting_the_kl_twice_is_refused():
    model = net()
    x, y = batch()
    model(x=x, labels=y)
    with pytest.raises(bara.BaraError, match=r"already in outputs\.loss"):
        bara.kl_loss(model)


def test_kl_loss_without_a_step_or_an_adapter_is_refused():
    with pytest.raises(bara.BaraError, match="no KL to add"):
        bara.kl_loss(net().eval())
    with pytest.raises(bara.BaraError, match="no Bayesian adapter"):
        bara.kl_loss(TinyNet())


def test_training_a_part_of_the_model_on_its_own_is_refused():
    model = adapt(tiny_llama(), task_type="CAUSAL_LM").train()
    with pytest.raises(bara.BaraError, match="Call the PEFT model itself"):
        model.base_model.model.model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_calling_the_base_model_of_the_adapter_still_trains_the_elbo():
    model = net()
    x, y = batch()
    with bara.sampling(model, seed=0):
        inner = model.get_base_model()(x=x, labels=y)["loss"]
        outer = model(x=x, labels=y)["loss"]
    torch.testing.assert_close(inner, outer)


def test_bf16_autocast_keeps_the_kl_in_float32(tiny_bert):
    model = stir(adapt(tiny_bert, task_type="SEQ_CLS")).train()
    ids = torch.randint(5, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), bara.sampling(model, seed=0):
            model(input_ids=ids)
        kl = bara.kl_loss(model)
        assert kl.dtype == torch.float32
        values.append((kl.item(), bara.kl_terms(model)["kl_global"]))
    assert values[0][1] == pytest.approx(values[1][1], rel=1e-6)  # parameters only
    assert values[0][0] == pytest.approx(values[1][0], rel=0.02)


def test_training_noise_is_fresh_every_step_and_replayed_by_the_seed():
    model = net(local_kl_weight=0.0, kl_weight=0.0)
    x, _ = batch()
    torch.manual_seed(0)
    first, second = model(x=x)["logits"], model(x=x)["logits"]
    torch.manual_seed(0)
    again = model(x=x)["logits"]
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_resumed_training_equals_uninterrupted_training(tiny_bert, tmp_path):
    def arguments(folder, **options):
        return TrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=4,
            num_train_epochs=4,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **options,
        )

    def trained(folder, resume=None):
        model = adapt(copy.deepcopy(tiny_bert), task_type="SEQ_CLS")
        trainer = Trainer(
            model,
            arguments(folder),
            train_dataset=classification_rows(),
            callbacks=[bara.BayesianCallback()],
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = trained("whole")
    resumed = trained("resumed", resume=str(tmp_path / "whole" / "checkpoint-4"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, atol=1e-6, rtol=1e-5)


def test_the_callback_logs_kl_and_rank(tiny_bert, tmp_path):
    model = adapt(tiny_bert, task_type="SEQ_CLS", num_observations=None)
    trainer = trainer_step(model, classification_rows(), tmp_path, 4, logging_steps=1)
    assert model.peft_config["default"].resolved.weight_noise == 0  # after a single step
    entry = trainer.state.log_history[0]
    assert entry["kl_global"] > 0
    assert entry["kl_local"] > 0
    assert 0 < entry["effective_rank"] <= 4
    assert model.peft_config["default"].resolved.num_observations == 8


def test_the_callback_says_so_when_it_overrides_n(tiny_bert, tmp_path):
    model = adapt(tiny_bert, task_type="SEQ_CLS", num_observations=50)
    with pytest.warns(UserWarning, match="num_observations=50, but the training data has 8"):
        trainer_step(model, classification_rows(), tmp_path, 4)


def test_a_copied_or_pickled_model_trains_on_its_own(tmp_path):
    model = net()
    x, y = batch()
    model(x=x, labels=y)["loss"].backward()
    copied = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copied, loaded):
        with bara.sampling(model, seed=0), bara.sampling(other, seed=0):
            ours, theirs = model(x=x, labels=y)["loss"], other(x=x, labels=y)["loss"]
        torch.testing.assert_close(ours, theirs)
        before = layer_posterior(model)[1].noise_logit.clone()
        layer_posterior(other)[1].noise_logit.data += 1
        torch.testing.assert_close(layer_posterior(model)[1].noise_logit, before)


DDP = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from helpers import gradients
from test_elbo import batch, net
import bara
rank = int(sys.argv[3])
meeting = f"file://{sys.argv[2]}.rendezvous"
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
model = net(local_kl_weight=0.1)
wrapped = torch.nn.parallel.DistributedDataParallel(model)
x, y = (part.chunk(2)[rank] for part in batch())
with bara.sampling(wrapped, seed=0):
    wrapped(x=x, labels=y)["loss"].backward()
if rank == 0:
    torch.save(gradients(model), sys.argv[2])
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(textwrap.dedent(DDP))
    arguments = [sys.executable, str(script), os.path.dirname(__file__)]
    arguments.append(str(tmp_path / "gradients.pt"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([*arguments, str(rank)], stderr=subprocess.PIPE, env=environment)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]
    model = net(local_kl_weight=0.1)
    x, y = batch()
    with bara.sampling(model, seed=0):
        model(x=x, labels=y)["loss"].backward()
    assert_same(gradients(model), torch.load(tmp_path / "gradients.pt"), rtol=1e-4, atol=1e-6)


def test_multiple_choice_rows_are_the_choices():
    config = BertConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    model = stir(adapt(BertForMultipleChoice(config), granularity="sequence")).eval()
    ids = torch.randint(5, 20, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 1, 4:] = 0
    mixed = model(input_ids=ids, attention_mask=mask).logits
    alone = model(input_ids=ids[:1, 1:2, :4], attention_mask=mask[:1, 1:2, :4]).logits
    torch.testing.assert_close(mixed[0, 1], alone[0, 0], atol=1e-5, rtol=1e-4)
    predictive = bara.predict(
        model, {"input_ids": ids, "attention_mask": mask}, num_draws=2, seed=1
    )
    with torch.no_grad(), bara.sampling(model, seed=1, first_draw=1):
        second = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    torch.testing.assert_close(predictive.log_probs_draws[1], second, atol=1e-5, rtol=1e-4)
    assert bara.effective_rank(model, {"input_ids": ids}).soft.shape[1] == 2
    model.train()
    loss = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert bara.kl_terms(model)["kl_local"] > 0


def test_passes_are_forgotten_once_they_are_differentiated():
    model = net()
    x, y = batch()
    passes = []
    for _ in range(4):
        output = model(x=x, labels=y)
        passes.append(weakref.ref(model.base_model.model.bara_elbo.last))
        output["loss"].backward()
        del output
    gc.collect()
    assert [reference() is None for reference in passes] == [True, True, True, False]


class Shared(torch.nn.Module):
    """One linear layer, applied several times."""

    def __init__(self, times):
        super().__init__()
        self.layer = torch.nn.Linear(6, 6)
        self.times = times

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x).tanh()
        return {"logits": x}


@pytest.mark.parametrize("method", WITH_KL)
def test_a_shared_layer_pays_its_kl_once(method):
    values = []
    for times in (1, 3):
        torch.manual_seed(0)
        model = stir(adapt(Shared(times), method, target_modules=["layer"])).train()
        if method in ("balora", "clora"):  # make what depends on the input the same for all
            torch.nn.init.zeros_(layer_posterior(model)[1].output_weight)
        model(x=torch.ones(2, 6))
        values.append(bara.kl_terms(model)["kl_global"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_training_in_evaluation_mode_warns():
    model = net().eval()
    x, y = batch()
    with pytest.warns(UserWarning, match=r"Call model\.train\(\)"):
        model(x=x, labels=y)["loss"].backward()


def test_a_frozen_adapter_asks_for_nothing():
    model = net(num_observations=None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x, y = batch()
    x.requires_grad_()
    model(x=x, labels=y)["loss"].backward()
    assert x.grad is not None


def test_kl_reaches_a_posterior_whose_matrices_are_frozen():
    model = net()
    layer, posterior = layer_posterior(model)
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    x, y = batch()
    with bara.sampling(model, seed=0):
        output = model(x=x, labels=y)
    data = (output["logits"] - y).square().mean()
    assert output["loss"].item() > data.item()
    output["loss"].backward()
    assert posterior.global_logit.grad.abs().sum() > 0


def test_an_adapter_whose_gates_have_closed_says_so():
    model = net(warmup=0.0)
    x, y = batch()
    model(x=x, labels=y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bara.kl_terms(model)["effective_rank"] > 1
    layer_posterior(model)[1].global_logit.data.fill_(-0.1)
    model(x=x, labels=y)
    with pytest.warns(UserWarning, match=r"gates of adapter 'default' are closed .*learning rate"):
        assert bara.kl_terms(model)["effective_rank"] < 0.01
