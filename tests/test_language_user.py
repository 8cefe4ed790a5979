"""What users of PEFT and TRL do with a language model after they have changed `LoraConfig`."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

import bara
from bara.adapter.layer import adapted_layers
from helpers import adapt, stir, tiny_llama
from language_models import tiny_lm, word_tokenizer, words

PAIRS = [(words(4, 5, 6), words(7, 8)), (words(9), words(10, 11, 12)), (words(5, 4), words(8))]
IDS = torch.arange(6, 20).reshape(2, 7)


def lm(**options):
    options = {"num_observations": None, "warmup": 0.0} | options
    names = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return adapt(tiny_lm("llama"), **names | options)


def arguments(config, tmp_path, **options):
    common = {"max_steps": 1, "per_device_train_batch_size": 3, "logging_steps": 1}
    common |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False}
    return config(output_dir=str(tmp_path), **common | options)


# -- preferences, from an adapter that was trained before ------------------------------------------


def dpo(model, tmp_path, **options):
    trl = pytest.importorskip("trl")
    rows = [{"prompt": p + " ", "chosen": c, "rejected": words(20, 21)} for p, c in PAIRS]
    return trl.DPOTrainer(
        model=model,
        args=arguments(trl.DPOConfig, tmp_path, max_length=32, learning_rate=0.0, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        callbacks=[bara.BayesianCallback()],
    )


def completions(model, batch):
    """log p(completion | prompt) of each row under the posterior mean, from the logits."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        log_probs = model(**given).logits[:, :-1].log_softmax(-1)
    of_labels = log_probs.gather(-1, batch["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
    return (of_labels * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("precomputed", [False, True])
def test_the_reference_of_a_trained_adapter_is_its_mean(tmp_path, precomputed):
    """TRL copies the adapter as `ref`, and asks for it in training mode."""
    trl = pytest.importorskip("trl")
    if Version(trl.__version__) < Version("1.16"):
        pytest.skip("its compute_ref_log_probs takes other arguments")
    trained = stir(lm(num_observations=50, weight_noise=1.0), 0.1).train()
    trainer = dpo(copy.deepcopy(trained), tmp_path, precompute_ref_log_probs=precomputed)
    trainer.train()  # at a learning rate of 0
    model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
    expected = completions(trained, batch)
    if precomputed:
        seen = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    else:
        seen = torch.cat(trainer.compute_ref_log_probs(model, batch))
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)
    assert trainer.state.log_history[0]["kl_global"] > 0


def test_what_is_trained_stays_noisy_beside_a_reference(tmp_path):
    model = dpo(stir(lm(weight_noise=1.0), 0.1), tmp_path).model.train()
    model.peft_config["default"].num_observations = 3
    first, second = (model(input_ids=IDS).logits for _ in range(2))
    assert not torch.allclose(first, second)
    with torch.no_grad():
        first, second = (model(input_ids=IDS).logits for _ in range(2))
    assert not torch.allclose(first, second)


# -- QLoRA -----------------------------------------------------------------------------------------


def test_the_posterior_is_trained_in_float32_by_qlora(tmp_path):
    """TRL makes what is trained on a quantised model bfloat16, where 100 times a gate's logit of
    0.03 cannot change by a step of 2e-5. Adam's first step is the learning rate."""
    pytest.importorskip("bitsandbytes")
    trl = pytest.importorskip("trl")
    from transformers import BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    trainer = trl.SFTTrainer(
        model=str(tmp_path / "base"),
        args=arguments(
            trl.SFTConfig,
            tmp_path,
            learning_rate=2e-5,
            model_init_kwargs={"quantization_config": four},
            max_length=32,
        ),
        train_dataset=Dataset.from_list([{"prompt": p + " ", "completion": c} for p, c in PAIRS]),
        processing_class=word_tokenizer(),
        peft_config=bara.BaraConfig(**options, warmup=0.0),
        callbacks=[bara.BayesianCallback()],
    )
    gates = {n: p for n, p in trainer.model.named_parameters() if n.endswith("global_logit")}
    before = {name: gate.detach().clone() for name, gate in gates.items()}
    trainer.train()
    assert len(gates) == 4
    for name, gate in gates.items():
        moved = (gate.detach() - before[name]).abs()
        torch.testing.assert_close(moved, torch.full((4,), 2e-5), rtol=0.05, atol=1e-9)


# -- batches of which nothing is to be learned -----------------------------------------------------


@pytest.mark.parametrize("num_items", [0, 10])
def test_a_batch_without_labels_changes_nothing(num_items):
    """Prompts that leave no room for their completions; the mean over no label is no number."""
    model = lm(num_observations=50).train()
    batch = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    loss = model(**batch, num_items_in_batch=torch.tensor(num_items)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("own_loss", [False, True])
def test_a_training_with_such_batches_stays_finite(tmp_path, accumulated, own_loss):
    rows = [{"input_ids": r, "labels": torch.full_like(r, -100)} for r in IDS.repeat(2, 1)]
    rows[1]["labels"] = rows[2]["labels"] = IDS[0]
    model = lm()
    options = arguments(
        TrainingArguments,
        tmp_path,
        max_steps=4 // accumulated,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulated,
        logging_nan_inf_filter=False,
    )
    own = bara.elbo_loss(model, lambda out, labels: ForCausalLMLoss(out.logits, labels, 64))
    trainer = Trainer(
        model,
        options,
        train_dataset=rows,
        compute_loss_func=own if own_loss else None,
        callbacks=[bara.BayesianCallback()],
    )
    trainer.train()
    assert model.peft_config["default"].resolved.num_observations == 2 * (IDS.shape[1] - 1)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 4 // accumulated
    assert all(math.isfinite(row["loss"]) for row in logged)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# -- copies of what TRL has trained ----------------------------------------------------------------


@pytest.fixture
def fine_tuned(tmp_path):
    """TRL gives the model it trains another `forward`, around the old one."""
    trl = pytest.importorskip("trl")
    trainer = trl.SFTTrainer(
        model=lm(),
        args=arguments(trl.SFTConfig, tmp_path, max_length=32),
        train_dataset=Dataset.from_list([{"prompt": p + " ", "completion": c} for p, c in PAIRS]),
        processing_class=word_tokenizer(),
        callbacks=[bara.BayesianCallback()],
    )
    trainer.train()
    return stir(trainer.model).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def test_a_copy_computes_with_its_own_adapter(fine_tuned):
    before, copied = logits(fine_tuned), copy.deepcopy(fine_tuned)
    torch.testing.assert_close(logits(copied), before)
    with bara.sampling(copied, seed=0), bara.sampling(fine_tuned, seed=0):
        torch.testing.assert_close(logits(copied), logits(fine_tuned))
        assert not torch.allclose(logits(copied), before)
    for _, layer, _ in layers_of(copied):
        torch.nn.init.zeros_(layer.lora_B["default"].weight)
    torch.testing.assert_close(logits(copied), logits(tiny_lm("llama")))
    torch.testing.assert_close(logits(fine_tuned), before)


def test_a_pruned_copy_is_what_its_folder_says(fine_tuned, tmp_path):
    pruning = bara.prune(fine_tuned, {"input_ids": IDS}, threshold=0.9)
    pruning.model.save_pretrained(tmp_path / "pruned")
    loaded = PeftModel.from_pretrained(tiny_lm("llama"), tmp_path / "pruned").eval()
    torch.testing.assert_close(logits(pruning.model), logits(loaded))
    assert not torch.allclose(logits(loaded), logits(fine_tuned))


# -- going on with a training ----------------------------------------------------------------------


def test_a_short_training_does_not_take_the_noise_of_a_longer_one_away(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def noise(model, steps):
        options = arguments(TrainingArguments, tmp_path, max_steps=steps, learning_rate=1e-3)
        Trainer(model, options, train_dataset=rows, callbacks=[bara.BayesianCallback()]).train()
        return model.peft_config["default"].resolved.weight_noise

    model = lm()
    assert noise(model, 80) == 2.0  # 4 (80 - 40) / 80
    assert noise(model, 10) == 2.0
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny_lm("llama"), tmp_path / "saved", is_trainable=True)
    assert noise(loaded, 10) == 2.0
    assert noise(loaded, 100) == 3.0
    assert noise(lm(), 10) == 0.0


# -- EVA -------------------------------------------------------------------------------------------


def test_eva_gives_the_layers_other_ranks(tmp_path):
    """By default EVA may double a layer's rank, and take another layer its own."""
    names = ["q_proj", "v_proj", "o_proj", "down_proj"]
    eva = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)}
    model = lm(target_modules=names, num_observations=50, **eva)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 60, (6,), generator=generator)} for _ in range(128)]
    loader = torch.utils.data.DataLoader(rows, batch_size=16)
    initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    ranks = {name: len(layer.lora_A["default"].weight) for name, layer, _ in layers_of(model)}
    assert set(ranks.values()) != {4}
    assert {name: p.rank for name, _, p in layers_of(model)} == ranks
    attached = model.base_model.elbo.adapters["default"].layers
    for name, layer, posterior in layers_of(model):
        assert attached[name] == (layer, posterior)
        assert all(parameter.requires_grad for parameter in posterior.parameters())

    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    stir(model).eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_lm("llama"), tmp_path).eval()
    with torch.no_grad(), bara.sampling(model, seed=1), bara.sampling(loaded, seed=1):
        torch.testing.assert_close(model(input_ids=IDS).logits, loaded(input_ids=IDS).logits)


def layers_of(model):
    return list(adapted_layers(model, "default"))


# -- folders of PEFT -------------------------------------------------------------------------------


def test_a_folder_that_a_trainer_saved_says_how_to_load_it(tmp_path):
    lm().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}", "utf-8")  # as `Trainer.save_model` does
    with pytest.raises(bara.BaraError, match=r"PeftModel\.from_pretrained") as error:
        bara.load_adapter(tmp_path)
    assert "restore" not in str(error.value)
