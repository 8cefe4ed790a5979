"""A new head's pace: `bara.scale_head`, and what files and other models see of it."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.preprocessing import StandardScaler
from transformers import (
    BertForTokenClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

import bara
from bara.training.head import ScaledLinear, restore_head
from bara.training.logistic import VARIANCES, prior_variance
from conftest import VOCABULARY, tiny_bert_config
from helpers import adapt, tiny_llama

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
        assert prior_variance(x, y, classes) == pytest.approx(best)
    assert prior_variance(x[:2], y[:2], 3) is None
    assert prior_variance(torch.ones(9, 4), y[:9], 3) is None


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
    assert scales[0] > scales[1] == 2.0 ** round(math.log2(0.2 / std))
    for labels in (torch.rand(10), torch.rand(10, 3)):  # a regression, several labels
        rows = [{**batch, "labels": labels} for batch in batches]
        assert bara.scale_head(model, rows) == scales[1]
    bare = [{name: b[name] for name in ("input_ids", "attention_mask")} for b in batches]
    assert bara.scale_head(model, bare) == scales[1]


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
    assert torch.equal(merged.state_dict()["classifier.weight"], weight)


@pytest.mark.parametrize("given", [None, 5.0])
def test_training_scales_and_restores(tiny_bert, batches, tmp_path, given):
    seen = []

    class Watch(bara.BayesianCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            seen.append(head_of(kwargs["model"]).scale)

    model = adapted(tiny_bert, head_input_std=given)
    batch = batches[0]
    rows = [{name: values[i] for name, values in batch.items()} for i in range(10)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", save_strategy="no", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[Watch()]).train()
    expected = adapted(tiny_bert.__class__(tiny_bert.config), head_input_std=given)
    expected.load_state_dict(model.state_dict())
    assert seen == [bara.scale_head(expected, batches[:1])] * 2
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
