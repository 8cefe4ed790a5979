"""TRL's trainers with BayesianCallback and KLMixin: N, the KL in the loss, the reference pass."""

import warnings

import pytest
import torch
from datasets import Dataset
from packaging.version import Version

import bara
from helpers import adapt
from language_models import tiny_lm, word_tokenizer, words

trl = pytest.importorskip("trl")

PAIRS = [(words(4, 5, 6), words(7, 8)), (words(9), words(10, 11, 12)), (words(5, 4), words(8))]
LABELS = sum(len(completion.split()) + 1 for _, completion in PAIRS)  # and the end of text


class SFT(bara.KLMixin, trl.SFTTrainer):
    pass


class DPO(bara.KLMixin, trl.DPOTrainer):
    pass


def lm(**options):
    torch.manual_seed(0)
    names = ["q_proj", "v_proj"]
    options = {"num_observations": None, "warmup": 0.0} | options
    return adapt(tiny_lm("llama"), target_modules=names, task_type="CAUSAL_LM", **options)


def arguments(config, tmp_path, **options):
    common = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 0.01,
        "max_length": 32,
    }
    return config(**{**common, **options})


def sft(tmp_path, model, **options):
    data = Dataset.from_list([{"prompt": p + " ", "completion": c} for p, c in PAIRS])
    return SFT(
        model=model,
        args=arguments(trl.SFTConfig, tmp_path, **options),
        train_dataset=data,
        processing_class=word_tokenizer(),
        callbacks=[bara.BayesianCallback()],
    )


def dpo(tmp_path, model, **options):
    data = Dataset.from_list(
        [{"prompt": p + " ", "chosen": c, "rejected": words(20, 21)} for p, c in PAIRS]
    )
    return DPO(
        model=model,
        args=arguments(trl.DPOConfig, tmp_path, **options),
        train_dataset=data,
        processing_class=word_tokenizer(),
        callbacks=[bara.BayesianCallback()],
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": False},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True, "packing_strategy": "bfd"},
        {"bf16": True},
    ],
)
def test_sft_counts_label_tokens_and_trains_the_elbo(tmp_path, options):
    model = lm()
    trainer = sft(tmp_path, model, **options)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="(?!The last training step|Gradients reached)")
        trainer.train()
    assert model.peft_config["default"].resolved.num_observations == LABELS
    logs = trainer.state.log_history[0]
    assert logs["kl_global"] > 0
    moved = [n for n, p in model.named_parameters() if n in before and not p.equal(before[n])]
    assert any("global_logit" in name for name in moved)


def test_conversations_count_the_labels_of_the_assistants_words(tmp_path):
    """The template marks them; the end of the text is one of them."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + ' ' + eos_token + ' ' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + ' w9 ' }}{% endif %}{% endfor %}"
    )
    turns = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in PAIRS
    ]
    model = lm()
    trainer = SFT(
        model=model,
        args=arguments(trl.SFTConfig, tmp_path, assistant_only_loss=True),
        train_dataset=Dataset.from_list([{"messages": turn} for turn in turns]),
        processing_class=tokenizer,
        callbacks=[bara.BayesianCallback()],
    )
    trainer.train()
    assert model.peft_config["default"].resolved.num_observations == LABELS
    assert trainer.state.log_history[0]["kl_global"] > 0


def loss_and_terms(make, tmp_path, kl_weight, items=None):
    """The trainer's loss of a batch, and the unweighted KL of that pass."""
    model = lm(kl_weight=kl_weight, local_kl_weight=0.0, num_observations=7)
    trainer = make(tmp_path, model, gradient_checkpointing=False)
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    torch.manual_seed(5)
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    loss.backward()
    gate = next(p for n, p in model.named_parameters() if "global_logit" in n)
    return loss.item(), bara.kl_terms(model)["kl_global"], gate.grad.clone()


@pytest.mark.parametrize(("make", "items"), [(sft, None), (sft, 2 * LABELS), (dpo, None)])
def test_the_loss_has_the_kl_with_its_weight(tmp_path, make, items):
    """loss(beta) - loss(0) = share * beta * KL / N, with N = 7 and the same noise."""
    with_kl, kl, gradient = loss_and_terms(make, tmp_path, 3.0, items)
    without, _, bare = loss_and_terms(make, tmp_path, 0.0, items)
    share = 1 if items is None else LABELS / items
    assert with_kl - without == pytest.approx(share * 3 * kl / 7, rel=1e-3)
    assert not torch.allclose(gradient, bare)


def test_dpo_trains_and_its_reference_is_the_base_model(tmp_path):
    """Before the first step the policy is the reference only in its base; N counts the pairs."""
    model = lm()
    trainer = dpo(tmp_path, model)
    trainer.train()
    assert model.peft_config["default"].resolved.num_observations == len(PAIRS)
    assert trainer.state.log_history[0]["kl_global"] > 0

    if Version(trl.__version__) < Version("1.16"):
        return  # its model gives logits, from which TRL takes the log-probabilities itself
    seen = {}
    base = tiny_lm("llama")
    original = model.get_base_model().forward

    def spy(*args, **kwargs):
        output = original(*args, **kwargs)
        if not torch.is_grad_enabled():
            seen["ids"], seen["mask"] = kwargs["input_ids"], kwargs["attention_mask"]
            seen["labels"], seen["log_probs"] = kwargs["labels"], output.log_probs
        return output

    model.get_base_model().forward = spy
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    trainer.compute_loss(model, dict(batch))
    with torch.no_grad():
        logits = base(input_ids=seen["ids"], attention_mask=seen["mask"]).logits[:, :-1]
    labels = seen["labels"][:, 1:]
    expected = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(
        seen["log_probs"], expected.masked_fill(labels == -100, 0), atol=1e-5, rtol=1e-4
    )


def test_without_the_mixin_the_callback_adds_the_kl(tmp_path):
    """See tests/test_callback_kl.py for the gradients."""
    model = lm()
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(trl.SFTConfig, tmp_path),
        train_dataset=Dataset.from_list([{"prompt": p, "completion": c} for p, c in PAIRS]),
        processing_class=word_tokenizer(),
        callbacks=[bara.BayesianCallback()],
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_without_the_callback_nothing_trains(tmp_path):
    trainer = trl.SFTTrainer(
        model=lm(),
        args=arguments(trl.SFTConfig, tmp_path),
        train_dataset=Dataset.from_list([{"prompt": p, "completion": c} for p, c in PAIRS]),
        processing_class=word_tokenizer(),
    )
    with pytest.raises(bara.BaraError, match=r"cannot train.*BayesianCallback"):
        trainer.train()
