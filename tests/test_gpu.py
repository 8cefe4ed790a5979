"""What a GPU computes, against the CPU; skipped where there is none."""

import copy

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import bara
from conftest import tiny_bert_config
from helpers import (
    CONFIGS,
    TinyConv,
    adapt,
    gradients,
    layer_posterior,
    stir,
    tiny_llama,
    train_log,
)
from processes import adapted, batch, differentiated, require_same, sharded_alone

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
METHODS = list(CONFIGS)
PROMPTS = ["the film is", "a plot"]
RANK_OPTIONS: list[dict[str, bool]] = [
    {},
    {"global_gate": False},
    {"local_gate": False},
]
IDS = torch.randint(1, 64, (6, 9), generator=torch.Generator().manual_seed(0))
IDS[1, :4] = 0
MASK = (IDS != 0).long()
TEXT = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.where(IDS != 0, -100)}
IMAGES = {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
IMAGES["labels"] = torch.arange(4)
CASES = [(method, tiny_llama, TEXT) for method in METHODS]
CASES += [(method, TinyConv, IMAGES) for method in METHODS]


def on_gpu(batch):
    return {name: value.to(DEVICE) for name, value in batch.items()}


def pair(method, make, **options):
    """The same adapted model on the CPU and on the GPU."""
    targets = {} if make is tiny_llama else {"target_modules": ["conv"]}
    model = stir(adapt(make(), method, **targets, **options))
    return model, copy.deepcopy(model).to(DEVICE)


@pytest.mark.parametrize(("method", "make", "batch"), CASES)
def test_the_same_seed_gives_the_draws_of_the_cpu(method, make, batch):
    cpu, gpu = (model.eval() for model in pair(method, make))
    twice = {name: torch.cat([value, value]) for name, value in batch.items()}
    with torch.no_grad():
        mean = gpu(**on_gpu(batch))["logits"].cpu()
        torch.testing.assert_close(mean, cpu(**batch)["logits"], atol=1e-4, rtol=1e-3)
        with bara.sampling(cpu, num_draws=2, seed=3):
            expected = cpu(**twice)["logits"]
        with bara.sampling(gpu, num_draws=2, seed=3):
            drawn = gpu(**on_gpu(twice))["logits"].cpu()
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-3)
    assert method == "mc-dropout" or not torch.allclose(drawn[: len(mean)], mean, atol=1e-3)


@pytest.mark.parametrize(("method", "make", "batch"), CASES)
def test_loss_and_gradients_of_a_draw_are_those_of_the_cpu(method, make, batch):
    models = pair(method, make)
    losses = []
    for model, rows in zip(models, (batch, on_gpu(batch)), strict=True):
        model.train()
        bara.set_progress(model, 1.0, 100)
        with bara.sampling(model, seed=3):
            loss = model(**rows)["loss"]
        loss.backward()
        losses.append(loss.detach().cpu())
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-4)
    expected, found = map(gradients, models)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() <= 1e-3 * scale + 1e-6, name


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_repeats_the_noise_of_the_gpu(method):
    found = []
    for checkpointing in (False, True):
        model = pair(method, tiny_llama)[1].train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        bara.set_progress(model, 1.0, 100)
        torch.manual_seed(0)
        loss = model(**on_gpu(TEXT))["loss"]
        loss.backward()
        found.append((loss.detach().cpu(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_fully_sharded_step_is_the_whole_one(method, checkpointing, tmp_path):
    """FSDP2 with NCCL, in one process; tests/test_processes.py has two, on CPUs."""
    torch.cuda.set_device(0)
    expected = differentiated(adapted(method).to(DEVICE), on_gpu(batch()))
    require_same(sharded_alone(method, checkpointing, DEVICE, tmp_path), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_trainer_in_half_precision_logs_the_kl(method, precision, tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert_config(num_labels=3))
    options = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    model = adapt(model, method, num_observations=None, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    rows = Dataset.from_dict(
        {
            "input_ids": [[2, 5 + i % 9, 6 + i % 7, 3] for i in range(24)],
            "attention_mask": [[1] * 4] * 24,
            "labels": [i % 3 for i in range(24)],
        }
    )
    options = {"num_train_epochs": 3, "per_device_train_batch_size": 8, precision: True}
    logged = train_log(model, rows, tmp_path / "out", **options)
    assert all(torch.tensor(row["loss"]).isfinite() for row in logged)
    if method != "mc-dropout":
        assert "kl_global" in logged[-1]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.isfinite().all(), name
            assert parameter.device.type == DEVICE
    moved = [
        n for n, p in model.named_parameters() if n in before and (p != before[n].to(DEVICE)).any()
    ]
    assert any("lora_A" in name for name in moved)
    predictive = bara.predict(model, rows, num_draws=4)
    assert predictive.probs.device.type == "cpu"
    torch.testing.assert_close(predictive.probs.sum(-1), torch.ones(24))


@pytest.mark.parametrize("options", RANK_OPTIONS, ids=str)
def test_ranks_merging_and_export_are_those_of_the_cpu(options, tmp_path):
    torch.manual_seed(0)
    base = BertForSequenceClassification(tiny_bert_config(num_labels=3)).eval()
    target = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    cpu = stir(adapt(base, **target, **options)).eval()
    gpu = copy.deepcopy(cpu).to(DEVICE)
    texts = {"input_ids": IDS % 20, "attention_mask": MASK}
    ranks = [bara.effective_rank(m, texts, num_draws=3, progress=False) for m in (cpu, gpu)]
    torch.testing.assert_close(ranks[1].soft.cpu(), ranks[0].soft, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ranks[1].draws.cpu(), ranks[0].draws)
    draws = []
    for number, model in enumerate((cpu, gpu)):
        folder = tmp_path / str(number)
        export = bara.export_lora(
            model, folder, mode="draws", num_draws=2, data=texts, held_out=texts, progress=False
        )
        assert export.difference is not None
        draws.append(load_file(folder / "draw-1" / "adapter_model.safetensors"))
    for name, weight in draws[0].items():
        torch.testing.assert_close(draws[1][name], weight, atol=1e-4, rtol=1e-3)
    closed = layer_posterior(gpu)[1]
    if options.get("global_gate", True):
        closed.global_logit.data[0] = -1.0
        pruning = bara.prune(gpu, texts, threshold=1e-3, held_out=texts, progress=False)
        assert pruning.removed >= 1
        assert pruning.change.mean.mean < 0.05
    merged = gpu.merge_and_unload()
    with torch.no_grad():
        assert merged(**on_gpu(texts)).logits.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_the_cpu(method, tiny_tokenizer):
    answers = []
    for model in pair(method, tiny_llama):
        found = bara.generate(model, tiny_tokenizer, PROMPTS, num_draws=3, max_new_tokens=4)
        answers.append([answer.tokens.tolist() for answer in found])
    assert answers[0] == answers[1]
