"""A new head's pace: `bara.scale_head`, and what files and other models see of it."""

import copy
import math
import sys
import warnings
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.preprocessing import StandardScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import bara
from bara.adapter.elbo import elbo_of
from bara.adapter.scaled_head import ScaledLinear, restore_head
from bara.training.head import Pace, _pace, scale_head_of
from bara.training.logistic import VARIANCES, CrossValidated, cross_validate
from conftest import VOCABULARY, tiny_bert_config
from helpers import adapt, tiny_llama, train_log

MODULES = ["query", "value"]


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(VOCABULARY), (3, 10, 7), generator=generator)
    mask = torch.ones(10, 7, dtype=torch.long)
    labels = torch.arange(10) % 2
    return [{"input_ids": i, "attention_mask": mask, "labels": labels} for i in ids]


def adapted(model, **options):
    return adapt(model, task_type=TaskType.SEQ_CLS, target_modules=MODULES, **options)


def head_of(model):
    return model.base_model.model.classifier.modules_to_save["default"]


class Watch(bara.BayesianCallback):
    """Keeps the head's scale in every step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        self.seen.append(head_of(kwargs["model"]).scale)


def test_the_scale_brings_the_frozen_features_to_the_width_that_was_asked_for(tiny_bert, batches):
    tiny_bert.eval()
    with torch.no_grad():
        pooled = torch.cat([tiny_bert.bert(b["input_ids"]).pooler_output for b in batches])
    std = math.sqrt(np.var(pooled.numpy(), axis=0).mean())
    model = adapted(tiny_bert, head_input_std=0.7)
    scale = bara.scale_head(model, batches)
    assert scale == 2.0 ** round(math.log2(0.7 / std))
    # the features are the frozen model's, whatever the adapter has learned
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    assert bara.scale_head(model, batches) == scale


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoders_head_is_measured_at_the_token_that_it_is_read_at(batches, side):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    for number, batch in enumerate(batches):
        for row in range(10):
            padding = (row + number) % 4
            tokens = slice(0, padding) if side == "left" else slice(7 - padding, 7)
            batch["input_ids"][row, tokens] = 0
            batch["attention_mask"] = (batch["input_ids"] != 0).long()
    last = []
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"]
            hidden = model.model(batch["input_ids"], mask).last_hidden_state
            last += [h[m.nonzero()[-1, 0]] for h, m in zip(hidden, mask, strict=True)]
    features = torch.stack(last).double()
    std = float((features - features.mean(0)).square().mean().sqrt())
    peft = adapt(model, task_type="SEQ_CLS", target_modules=["q_proj"], head_input_std=0.2)
    before = peft(**batches[0]).logits.detach()
    scale = bara.scale_head(peft, batches)
    assert scale == 2.0 ** round(math.log2(0.2 / std))
    assert scale < 1
    by_default = adapt(
        LlamaForSequenceClassification(config), task_type="SEQ_CLS", target_modules=["q_proj"]
    )
    assert bara.scale_head(by_default, batches) is None
    torch.testing.assert_close(peft(**batches[0]).logits, before)


def test_the_prior_is_the_one_that_scikit_learn_finds():
    generator = torch.Generator().manual_seed(0)
    for signal, classes in ((0.15, 2), (0.6, 3), (3.0, 3)):
        y = torch.randint(classes, (90,), generator=generator)
        x = torch.randn(90, 12, generator=generator).double() + 5
        x[:, :classes] += signal * torch.nn.functional.one_hot(y, classes)
        rows = StandardScaler(with_std=False).fit_transform(x.numpy())
        rows = np.c_[rows / np.sqrt(np.mean(rows**2)), np.full(len(rows), 12**0.5)]
        search = GridSearchCV(
            LogisticRegression(fit_intercept=False, max_iter=5000, tol=1e-8),
            # of two classes scikit-learn has the difference of our two rows of weights
            {"C": [(2 if classes == 2 else 1) * variance for variance in VARIANCES]},
            scoring="neg_log_loss",
            cv=KFold(3, shuffle=True, random_state=0),
        ).fit(rows, y.numpy())
        best = search.best_params_["C"] / (2 if classes == 2 else 1)
        found = cross_validate(x, y, classes)
        assert found.variance == pytest.approx(best)
        assert found.nll == pytest.approx(-search.best_score_, rel=0.03)  # ours stops earlier
    assert cross_validate(x[:2], y[:2], 3) is None
    assert cross_validate(torch.ones(9, 4), y[:9], 3) is None


def test_a_head_is_quicker_where_frozen_features_tell_the_classes_apart(tiny_bert, batches):
    tiny_bert.eval()
    with torch.no_grad():
        pooled = torch.cat([tiny_bert.bert(b["input_ids"]).pooler_output for b in batches])
    centred = pooled - pooled.mean(0)
    told = (centred @ torch.linalg.svd(centred)[2][0] > 0).long().split(10)  # along their width
    std = float(centred.square().mean().sqrt())
    model = adapted(tiny_bert)
    quick = [{**b, "labels": y} for b, y in zip(batches, told, strict=True)]
    slow = [{**b, "labels": torch.full((10,), k)} for b in batches for k in (0, 1)]  # either label
    scales = [bara.scale_head(model, rows) for rows in (quick, slow)]
    narrowest = 2.0 ** round(math.log2(0.2 / std))
    assert scales[0] > narrowest == scales[1]
    for labels in (torch.rand(10), torch.rand(10, 3)):  # a regression, several labels
        rows = [{**batch, "labels": labels} for batch in batches]
        assert bara.scale_head(model, rows) == narrowest
    bare = [{name: b[name] for name in ("input_ids", "attention_mask")} for b in batches]
    assert bara.scale_head(model, bare) == narrowest


def spread_signal(strength):
    """Features that hardly vary, and labels that many of them tell a little of."""
    generator = torch.Generator().manual_seed(2)
    x = 0.03 * torch.randn(600, 64, generator=generator, dtype=torch.double)
    logits = strength * (x / 0.03).sum(1) / 8
    return x, (logits + torch.randn(600, generator=generator) > 0).long()


def test_a_head_is_left_slow_where_features_tell_little_but_not_nothing():
    nothing, little, much = (_pace(*spread_signal(strength), None, 2) for strength in (0, 0.9, 9))
    narrowest = 2.0 ** round(math.log2(0.2 / 0.03))
    x, labels = spread_signal(0.9)
    assert (nothing.scale, nothing.pace) == (narrowest, 1.0)
    assert (little.scale, little.pace) == (
        1.0,
        pytest.approx(float((x - x.mean(0)).square().mean().sqrt()) / 0.2),
    )
    assert much.scale >= narrowest
    assert much.pace == 1.0
    assert _pace(4 * x, labels, None, 2) == Pace(2.0, 1.0, little.frozen_nll)  # wide enough
    entropy = math.log(2)
    assert nothing.frozen_nll > 0.93 * entropy > little.frozen_nll


@pytest.mark.parametrize("strength", [0, 0.9, 9])
def test_a_head_in_haste_is_quicker_whatever_its_features_tell(strength):
    x, labels = spread_signal(strength)
    usual = _pace(x, labels, None, 2)
    assert _pace(x, labels, None, 2, haste=8.0) == usual._replace(scale=8 * usual.scale)
    # what was asked for is what it says
    assert _pace(x, labels, 0.2, 2, haste=8.0) == _pace(x, labels, 0.2, 2)


def test_a_mean_that_all_inputs_have_bounds_the_pace():
    """At 1e-3 a step of Adam moves each weight by that: all logits by 1e-3 scale |mean|_1."""
    x, labels = spread_signal(9)
    free = _pace(x, labels, None, 2, haste=8.0).scale
    wide = x + 1000 / (2 * free) / x.shape[1]
    assert _pace(wide, labels, None, 2, haste=8.0).scale == free
    much = x + 8 * 1000 / free / x.shape[1]
    scale = _pace(much, labels, None, 2, haste=8.0).scale
    assert free / 16 <= scale <= free / 4
    assert 1e-3 * scale * float(much.mean(0).abs().sum()) < 1.5
    assert _pace(x + 100, labels, None, 2).scale == 1.0  # no slower than as PEFT trains it
    # what was asked for is what it says
    assert _pace(much, labels, 0.2, 2) == _pace(x, labels, 0.2, 2)


@pytest.mark.parametrize(
    ("examples", "steps", "rate", "factor"),
    [
        (3000, None, None, 1),
        (3000, 400, 1e-3, 1),
        (3000, 4000, 1e-2, 1),
        (3000, 50, None, 8),
        (3000, 200, 2.5e-4, 8),
        (3000, 2000, 2.5e-5, 8),
        (3000, 25, 5e-4, 32),
        (300, 50, 1e-3, 4),
        (75, 50, 1e-3, 1),  # few examples, seen often
        (75, 100, 2.5e-4, 2),
    ],
)
def test_in_short_and_slow_trainings_a_head_moves_as_far(
    tiny_bert, batches, examples, steps, rate, factor
):
    usual = bara.scale_head(adapted(copy.deepcopy(tiny_bert)), batches)
    model = adapted(tiny_bert, num_observations=examples)
    assert bara.scale_head(model, batches, steps, rate) == factor * usual
    assert math.isfinite(bara.scale_head(model, batches, 1, 0.0))  # where nothing moves
    # a short training that goes on with an adapter is no short training
    bara.set_progress(model, 0.0, 4000, 1e-3)
    assert bara.scale_head(model, batches, steps, rate) == usual


def test_the_callback_says_how_long_and_how_slow_the_training_is(tiny_bert, batches, tmp_path):
    usual = bara.scale_head(adapted(copy.deepcopy(tiny_bert)), batches)
    watch = Watch()
    rows = [{name: v[i] for name, v in batch.items()} for batch in batches for i in range(10)]
    arguments = TrainingArguments(
        str(tmp_path),
        learning_rate=2.5e-4,
        warmup_steps=2,
        max_steps=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(adapted(tiny_bert), arguments, train_dataset=rows, callbacks=[watch]).train()
    haste = 2 / 3 * len(rows) / (4 * 0.25)
    assert watch.seen == [2 ** round(math.log2(haste)) * usual] * 4


@pytest.mark.parametrize("warmup", [None, 0.3])
def test_where_a_head_is_left_slow_kl_and_noise_wait_for_it(
    tiny_bert, batches, warmup, monkeypatch
):
    with torch.no_grad():
        for parameter in tiny_bert.bert.pooler.parameters():
            parameter.mul_(0.5)
        pooled = torch.cat([tiny_bert.eval().bert(b["input_ids"]).pooler_output for b in batches])
    std = float((pooled - pooled.mean(0)).square().mean().sqrt())
    model = adapted(copy.deepcopy(tiny_bert), warmup=warmup)
    resolved = elbo_of(model).adapters["default"].resolved
    with monkeypatch.context() as patch:  # a linear head makes little of them
        patch.setattr("bara.training.head.cross_validate", lambda *_: CrossValidated(0.003, 0.5))
        assert bara.scale_head(model, batches) == 1.0
    bara.set_progress(model, 0.0, num_steps=200)
    pace = resolved.head_pace
    assert pace == pytest.approx(std / 0.2)
    assert pace < 0.5
    assert resolved.warmup == (0.9 if warmup is None else warmup)
    part = min(1.0, max(0.0, (200 * pace - 40) / 80))
    assert resolved.weight_noise == pytest.approx(part * resolved.whole["weight_noise"])
    # a head that was given its pace learns from the start
    model = adapted(copy.deepcopy(tiny_bert), head_input_std=0.2, warmup=warmup)
    bara.scale_head(model, batches)
    bara.set_progress(model, 0.0, num_steps=200)
    resolved = elbo_of(model).adapters["default"].resolved
    assert (resolved.head_pace, resolved.warmup) == (1.0, warmup or 0.5)
    assert resolved.weight_noise == resolved.whole["weight_noise"]


def test_outputs_and_files_do_not_change(tiny_bert, batches, tmp_path):
    model = adapted(tiny_bert, head_input_std=5.0).eval()
    weight = head_of(model).weight.detach().clone()
    before = model(**batches[0]).logits
    scale = bara.scale_head(model, batches)
    assert scale not in (None, 1.0)
    head = head_of(model)
    assert type(head) is ScaledLinear
    assert torch.equal(head.weight * scale, weight)
    torch.testing.assert_close(model(**batches[0]).logits, before)
    assert torch.equal(head.state_dict()["weight"], weight)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert.__class__(tiny_bert.config), tmp_path)
    assert type(head_of(loaded)) is torch.nn.Linear
    assert torch.equal(head_of(loaded).weight, weight)
    # loading into the scaled layer takes the file's weight for what it is
    head.load_state_dict({"weight": 2 * weight, "bias": head.bias.detach()})
    torch.testing.assert_close(head.state_dict()["weight"], 2 * weight, rtol=0, atol=0)
    restore_head(model)
    assert type(head) is torch.nn.Linear
    assert torch.equal(head.weight, 2 * weight)


def test_an_optimiser_moves_the_weight_scale_times_as_far(tiny_bert, batches):
    model = adapted(tiny_bert, head_input_std=50.0).train()
    scale = bara.scale_head(model, batches)
    head = head_of(model)
    before = head.state_dict()["weight"].clone()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.0)
    bara.set_progress(model, 0.0, 100)
    model(**batches[0]).loss.backward()
    optimizer.step()
    moved = (head.state_dict()["weight"] - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, scale * 1e-3), rtol=1e-2, atol=1e-5)


def test_a_merged_model_in_the_middle_of_training_is_whole(tiny_bert, batches):
    model = adapt(
        tiny_bert, "scalabl", task_type="SEQ_CLS", target_modules=MODULES, head_input_std=5.0
    )
    weight = head_of(model).weight.detach().clone()
    assert bara.scale_head(model, batches) not in (None, 1.0)
    merged = model.merge_and_unload()
    assert type(merged.classifier) is torch.nn.Linear
    assert torch.equal(merged.state_dict()["classifier.weight"], weight)


@pytest.mark.parametrize("given", [None, 5.0])
def test_training_scales_and_restores(tiny_bert, batches, tmp_path, given):
    watch = Watch()
    model = adapted(tiny_bert, head_input_std=given)
    batch = batches[0]
    rows = [{name: values[i] for name, values in batch.items()} for i in range(10)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", save_strategy="no", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[watch]).train()
    expected = adapted(
        tiny_bert.__class__(tiny_bert.config), head_input_std=given, num_observations=len(rows)
    )
    expected.load_state_dict(model.state_dict())
    rate = arguments.learning_rate
    assert watch.seen == [bara.scale_head(expected, batches[:1], 2, rate)] * 2
    assert type(head_of(model)) is torch.nn.Linear


def test_what_has_no_such_head_is_left_alone(tiny_bert, batches):
    assert bara.scale_head(adapted(tiny_bert, head_input_std=0.0), batches) is None
    tokens = BertForTokenClassification(tiny_bert_config())
    tokens = adapt(tokens, task_type="TOKEN_CLS", target_modules=MODULES)
    assert bara.scale_head(tokens, batches) is None
    language = adapt(tiny_llama(), task_type="CAUSAL_LM", target_modules=["q_proj"])
    assert bara.scale_head(language, batches) is None
    headless = adapt(BertModel(tiny_bert_config()), target_modules=MODULES)
    assert bara.scale_head(headless, batches) is None


def test_what_cannot_be_scaled_is_said(tiny_bert):
    with pytest.raises(bara.BaraError, match="no batches"):
        bara.scale_head(adapted(tiny_bert), [])
    with pytest.raises(bara.BaraError, match="head_input_std"):
        bara.BaraConfig(head_input_std=-1.0)
    plain = get_peft_model(BertModel(tiny_bert_config()), LoraConfig(target_modules=MODULES))
    with pytest.raises(bara.BaraError, match="no Bayesian adapter"):
        bara.scale_head(plain, [])


# -- what happens to a model ----------------------------------------------------------------------


def rows_of(batch):
    return [{name: values[i] for name, values in batch.items()} for i in range(10)]


def trainer(model, rows, folder, kind=Trainer, n=None, **options):
    options = {"max_steps": 4, "save_strategy": "no", "per_device_train_batch_size": 5} | options
    arguments = TrainingArguments(
        str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=0.01,
        **options,
    )
    callback = bara.BayesianCallback(n)
    return kind(model, arguments, train_dataset=rows, callbacks=[callback])


def test_a_training_goes_on_as_if_it_had_not_stopped(tiny_bert, batches, tmp_path):
    models = [adapted(copy.deepcopy(tiny_bert), head_input_std=5.0) for _ in range(2)]
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(models[0], rows_of(batches[0]), tmp_path, **saving).train()
    last = trainer(models[1], rows_of(batches[0]), tmp_path / "b")
    last.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], tensor), name


def test_the_best_checkpoint_is_loaded_into_the_scaled_head(tiny_bert, batches, tmp_path):
    model = adapted(tiny_bert, head_input_std=5.0)
    metrics = iter([{"good": 1}, {"good": 0}])
    best = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="good",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=rows_of(batches[0]),
        eval_dataset=rows_of(batches[1]),
        compute_metrics=lambda _: next(metrics),
        callbacks=[bara.BayesianCallback()],
    )
    best.train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    weight = next(tensor for name, tensor in saved.items() if "classifier.weight" in name)
    assert torch.equal(head_of(model).weight, weight)


def test_what_is_frozen_stays_frozen(tiny_bert, batches):
    model = adapted(tiny_bert)
    for name, parameter in model.named_parameters():
        if "layer.0" in name or "classifier.modules_to_save.default.bias" in name:
            parameter.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert bara.scale_head(model, batches)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_weights_and_inputs_of_16_bits_are_not_rounded(tiny_bert, batches):
    for dtype in (torch.float16, torch.bfloat16):
        model = adapted(copy.deepcopy(tiny_bert).to(dtype), head_input_std=5.0).eval()
        weight, before = head_of(model).weight.detach().clone(), model(**batches[0]).logits
        scale = bara.scale_head(model, batches)
        assert (scale is None) == (dtype == torch.float16)  # would round the smallest weights
        assert torch.equal(head_of(model).state_dict()["weight"], weight)
        assert torch.equal(model(**batches[0]).logits, before)
    model = adapted(tiny_bert, head_input_std=1e6).eval()
    assert bara.scale_head(model, batches) > torch.finfo(torch.float16).max
    with torch.autocast("cpu", torch.float16):
        assert model(**batches[0]).logits.isfinite().all()


def test_compiled_heads(tiny_bert, batches):
    model = adapted(tiny_bert, head_input_std=5.0).eval()
    logits = model(**batches[0]).logits
    expected = bara.scale_head(model, batches)
    model.base_model.model.classifier.compile(backend="eager")
    for _ in range(2):
        assert bara.scale_head(model, batches) == expected
        torch.testing.assert_close(model(**batches[0]).logits, logits)


def test_layers_with_hooks_of_accelerate(tiny_bert, batches, tmp_path):
    expected = bara.scale_head(adapted(copy.deepcopy(tiny_bert), head_input_std=5.0), batches)
    places = {"bert.embeddings": "disk", "bert.encoder": "cpu", "bert.pooler": "cpu"}
    places |= {"dropout": "cpu", "classifier": "cpu"}
    options = {"main_device": "cpu", "force_hooks": True}
    base = dispatch_model(tiny_bert, places, offload_dir=tmp_path, **options)
    model = adapted(base, head_input_std=5.0).eval()
    before = model(**batches[0]).logits
    assert bara.scale_head(model, batches) == expected
    torch.testing.assert_close(model(**batches[0]).logits, before)
    restore_head(model)
    torch.testing.assert_close(model(**batches[0]).logits, before)


def test_sharded_models(tiny_bert, batches, tmp_path):
    """What a pass leaves unsharded is a copy; the weight itself has to change."""
    plain = adapted(copy.deepcopy(tiny_bert), head_input_std=5.0)
    scale = bara.scale_head(plain, batches)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = adapted(tiny_bert, head_input_std=5.0)
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.base_model.model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert bara.scale_head(model, batches) == scale
        bara.set_progress(model, 0.5, 10)
        model.train()(**batches[0]).loss.backward()
        weight = head_of(plain).state_dict()["weight"]
        assert torch.equal(head_of(model).state_dict()["weight"].full_tensor(), weight)
        with torch.no_grad():
            model.eval()(**batches[0])
        restore_head(model)
        assert torch.equal(head_of(model).state_dict()["weight"].full_tensor(), weight)
        assert torch.equal(next(iter(head_of(model).parameters())).full_tensor(), weight)
    finally:
        dist.destroy_process_group()


def test_heads_of_several_layers_and_of_several_adapters(tiny_bert, batches):
    config = RobertaConfig(**tiny_bert_config(num_labels=3).to_diff_dict() | {"pad_token_id": 0})
    roberta = adapted(RobertaForSequenceClassification(config))
    assert bara.scale_head(roberta, batches)
    assert type(head_of(roberta).dense) is torch.nn.Linear
    assert type(head_of(roberta).out_proj) is ScaledLinear
    two = adapted(tiny_bert)
    two.add_adapter("b", bara.BaraConfig(task_type="SEQ_CLS", target_modules=MODULES))
    heads = two.base_model.model.classifier.modules_to_save
    for name, other in (("b", "default"), ("default", "b")):
        two.set_adapter(name)
        assert bara.scale_head(two, batches)
        assert type(heads[name]) is ScaledLinear
        assert type(heads[other]) is torch.nn.Linear


# -- what happens to the data ----------------------------------------------------------------------


def test_a_width_that_labels_do_not_tell(tiny_bert, batches, tmp_path):
    narrow = [{**b, "labels": torch.rand(10)} for b in batches]
    one = adapted(BertForSequenceClassification(tiny_bert_config(num_labels=1)))
    assert bara.scale_head(one, batches) == bara.scale_head(one, narrow)  # whole numbers to predict
    choices = adapted(BertForMultipleChoice(tiny_bert_config()), modules_to_save=["classifier"])
    ids = batches[0]["input_ids"][:9].view(3, 3, 7)
    rows = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": torch.tensor(k)}
        for k, i in enumerate(ids)
    ]
    assert bara.scale_head(choices, DataLoader(rows, 2))
    assert train_log(choices, rows, tmp_path, max_steps=1, use_cpu=True)


def test_features_that_do_not_vary_are_no_measure(tiny_bert, batches):
    model = adapted(tiny_bert)
    padded = torch.nn.functional.pad
    text = {name: batches[0][name][:1] for name in ("input_ids", "attention_mask")}
    again = [{k: padded(v, (0, n)) for k, v in text.items()} for n in range(5)]
    assert bara.scale_head(model, again) is None  # they differ by what rounding leaves
    assert bara.scale_head(model, again[:1]) is None
    tiny_bert.bert.pooler.dense.weight.data.fill_(math.nan)
    assert bara.scale_head(model, batches) is None


def test_few_labels_do_not_warn_of_a_regression():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
        assert cross_validate(x, torch.arange(24), 24).variance in VARIANCES


def test_batches_that_no_model_takes(tiny_bert):
    with pytest.raises(bara.BaraError, match="tuple, not a mapping"):
        bara.scale_head(adapted(tiny_bert), [(1, 2)])


def test_a_language_models_trained_head_is_left_alone(batches, tmp_path):
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = adapt(
        T5ForConditionalGeneration(config),
        task_type="SEQ_2_SEQ_LM",
        target_modules=["q"],
        modules_to_save=["lm_head"],
    )
    rows = rows_of(batches[0] | {"labels": batches[0]["input_ids"]})
    assert train_log(model, rows, tmp_path, max_steps=1, use_cpu=True)
    assert bara.scale_head(model, batches) is None


class Stream(IterableDataset):
    """Rows without numbers; with a length, or to be read but once."""

    def __init__(self, rows, once=False):
        self.rows, self.once = iter(rows) if once else rows, once

    def __iter__(self):
        return self if self.once else iter(list(self.rows))

    def __next__(self):
        return next(self.rows)


class SizedStream(Stream):
    def __len__(self):
        return len(self.rows)


class Strict(BertForSequenceClassification):
    """Takes no column that it does not know, unlike BERT."""

    def forward(self, weight=None, **inputs):
        if weight is not None:
            raise TypeError("unexpected keyword argument 'weight'")
        return super().forward(**inputs)


def own_loader(loader):
    class Own(Trainer):
        def get_train_dataloader(self):
            return loader

    return Own


class OwnLoss(Trainer):
    """Takes a column that is not for the model."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = {name: values for name, values in inputs.items() if name != "weight"}
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_whatever_can_be_trained_on_trains(tiny_bert, batches, tmp_path):
    """A warning says where the head is left alone, and nowhere else."""
    rows = rows_of(batches[0])
    weighted = [{**row, "weight": torch.tensor(1.0)} for row in rows]
    cases = [
        (Stream(rows), {}, None),
        (SizedStream(rows), {}, None),
        (rows, {"kind": own_loader(DataLoader(batches, batch_size=None))}, None),
        (rows[:1], {}, None),
        (Stream(rows, once=True), {"n": 10, "max_steps": 2}, "read only once"),
        (rows, {"kind": own_loader(batches), "n": 10}, "no data set"),
        (weighted, {"kind": OwnLoss}, "unexpected keyword argument 'weight'"),
    ]
    for data, options, warning in cases:
        model = Strict(tiny_bert.config)
        options = {"max_steps": 1, "remove_unused_columns": False} | options
        made = trainer(adapted(model), data, tmp_path, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made.train()
        assert made.state.global_step == made.state.max_steps
        said = [str(w.message) for w in caught if "The head learns as PEFT" in str(w.message)]
        assert len(said) == (warning is not None)
        assert warning is None or warning in said[0]


class DeepSpeedState:
    distributed_type = "DEEPSPEED"


@pytest.fixture
def under_deepspeed(monkeypatch):
    """Accelerate's state is what it is where DeepSpeed trains."""
    monkeypatch.setattr("bara.posteriors.parameters.is_initialized", lambda: True)
    monkeypatch.setattr("bara.posteriors.parameters.PartialState", DeepSpeedState)


def test_deepspeeds_copies_are_not_gone_past(tiny_bert, batches, under_deepspeed):
    """Without ZeRO it trains copies of weights of 16 bits that nobody reaches: a weight that is
    divided would be put back, and its outputs be multiplied all the same. Weights of 32 bits have
    no copies (tests/test_deepspeed.py trains with DeepSpeed itself)."""
    model = adapted(tiny_bert)
    scale_head_of(model, DataLoader(rows_of(batches[0])))
    assert type(head_of(model)) is ScaledLinear
    restore_head(model)
    model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="out of reach without ZeRO"):
        scale_head_of(model, DataLoader(rows_of(batches[0])))
    assert type(head_of(model)) is torch.nn.Linear


def test_noise_starts_where_deepspeed_goes_on(tiny_bert, monkeypatch, under_deepspeed):
    """The start that goes by the steps reaches ZeRO's copies too, or is not taken."""
    model = adapted(tiny_bert, num_observations=8)
    (_, posterior), *others = elbo_of(model).adapters["default"].layers.values()
    posterior.to(torch.bfloat16)
    start = posterior.noise_logit.detach().clone()
    copies = {}
    utils = ModuleType("deepspeed.utils")
    utils.safe_set_full_fp32_param = lambda parameter, value: copies.update({parameter: value})
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
    for _, other in others:
        other.noise_logit._hp_mapping = object()
    bara.set_progress(model, 0.0, 40)
    assert torch.equal(posterior.noise_logit, start)  # 16 bits, and no mapping to a copy
    assert len(copies) == len(others)
    for _, other in others:
        assert torch.equal(copies[other.noise_logit], other.noise_logit)
        assert (other.noise_logit * 100).exp().mean().item() == pytest.approx(0.5 / 8, rel=1e-4)


def test_telling_the_steps_starts_no_group_of_processes(monkeypatch):
    """A loop of one's own under torchrun starts the group itself, and when it likes."""
    monkeypatch.setattr("bara.posteriors.parameters.is_initialized", lambda: False)
    monkeypatch.setattr("bara.posteriors.parameters.PartialState", None)
    bara.set_progress(adapt(tiny_llama()), 0.0, 40)
