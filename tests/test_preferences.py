"""Reward models: scores and preferences under the mixture, and training with TRL's trainer."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

import bara
from bara import BaraError, PreferencePredictive
from bara.evaluation.metrics import measure
from helpers import SIZES, adapt, stir
from language_models import word_tokenizer, words

PAIRS = [
    {"prompt": words(4, 5) + " ", "chosen": words(6, 7), "rejected": words(8)},
    {"prompt": words(9) + " ", "chosen": words(10), "rejected": words(11, 12, 13)},
    {"prompt": words(14, 3) + " ", "chosen": words(6), "rejected": words(7)},
]
DRAWS = 4


def reward_model(stirred=True, **options):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(
        LlamaConfig(**SIZES, initializer_range=0.3, num_labels=1, eos_token_id=2)
    )
    model = adapt(base, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", **options)
    return stir(model).eval() if stirred else model


@torch.no_grad()
def reward(model, text, draw, seed=0):
    """Of one text with its end, alone, under one draw."""
    ids = word_tokenizer()(text)["input_ids"]
    with bara.sampling(model, seed=seed, first_draw=draw):
        return model(input_ids=torch.tensor([[*ids, 2]])).logits.item()


def test_probabilities_are_bradley_terry_averaged_over_draws():
    model, tokenizer = reward_model(), word_tokenizer()
    predictive = bara.predict_preferences(model, tokenizer, PAIRS, num_draws=DRAWS, batch_size=8)
    for i, pair in enumerate(PAIRS):
        chosen, rejected = (
            torch.tensor([reward(model, pair["prompt"] + pair[side], d) for d in range(DRAWS)])
            for side in ("chosen", "rejected")
        )
        torch.testing.assert_close(predictive.chosen_draws[:, i], chosen, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(predictive.rejected_draws[:, i], rejected, atol=1e-4, rtol=1e-4)
        margin = chosen - rejected
        wins = 1 / (1 + torch.exp(-margin.double()))
        assert predictive.probs[i].item() == pytest.approx(wins.mean().item(), abs=1e-4)
        assert predictive.margin[i].item() == pytest.approx(margin.mean().item(), abs=1e-4)
        std = margin.std(correction=0).item()
        assert predictive.margin_std[i].item() == pytest.approx(std, abs=1e-4)

        def entropy(p):
            return -(p * p.log() + (1 - p) * (1 - p).log())

        total, aleatoric = entropy(wins.mean()).item(), entropy(wins).mean().item()
        record = predictive.to_records()[i]
        assert record["total"] == pytest.approx(total, abs=1e-4)
        assert record["epistemic"] == pytest.approx(total - aleatoric, abs=1e-4)
        assert record["probability"] == pytest.approx(wins.mean().item(), abs=1e-4)
    assert predictive.margin_std.min() > 1e-3


def test_predict_gives_the_distribution_of_a_score():
    model, tokenizer = reward_model(), word_tokenizer()
    texts = [pair["prompt"] + pair["chosen"] + " </s>" for pair in PAIRS]
    data = [dict(tokenizer(text)) for text in texts]
    rows = [{k: row[k] for k in ("input_ids", "attention_mask")} for row in data]
    scores = bara.predict(model, rows, num_draws=DRAWS)
    pairs = bara.predict_preferences(model, tokenizer, PAIRS, num_draws=DRAWS)
    torch.testing.assert_close(scores.mean, pairs.chosen_draws.mean(0), atol=1e-4, rtol=1e-4)
    expected = pairs.chosen_draws.var(0, correction=0)
    torch.testing.assert_close(scores.epistemic_variance, expected, atol=1e-4, rtol=1e-3)


def test_metrics_and_ties():
    chosen = torch.tensor([[2.0, 0.0, -1.0, 1.0], [3.0, 0.0, -2.0, -0.5]])
    rejected = torch.zeros(2, 4)
    predictive = PreferencePredictive(chosen, rejected)
    evaluation = measure(predictive.choice)
    wins = torch.sigmoid(chosen.double()).mean(0)
    assert wins[3] > 0.5
    metrics = evaluation.metrics
    assert metrics["accuracy"] == pytest.approx(0.5)  # the tie and the third are wrong
    assert metrics["nll"] == pytest.approx(-wins.log().mean().item(), rel=1e-5)
    same = PreferencePredictive(torch.ones(1, 3), torch.ones(1, 3))
    assert measure(same.choice).metrics["accuracy"] == 0
    with pytest.raises(BaraError, match="must both have the shape"):
        PreferencePredictive(torch.ones(1, 3), torch.ones(1, 2))


def test_evaluate_preferences_measures_what_is_predicted():
    model, tokenizer = reward_model(), word_tokenizer()
    evaluation = bara.evaluate_preferences(model, tokenizer, PAIRS, num_draws=DRAWS)
    probs = bara.predict_preferences(model, tokenizer, PAIRS, num_draws=DRAWS).probs
    assert evaluation.metrics["nll"] == pytest.approx(-probs.log().mean().item(), rel=1e-4)
    assert evaluation.metrics["accuracy"] == pytest.approx((probs > 0.5).double().mean().item())
    assert 0 <= evaluation.metrics["ece"] <= 1


def test_pairs_that_make_no_sense():
    model, tokenizer = reward_model(), word_tokenizer()
    talk = [{"role": "user", "content": "w4"}]
    for pairs, match in [
        ([], "at least one"),
        (PAIRS[0], "Give a list of pairs"),
        ([PAIRS[0], {"chosen": "w4"}], "pair 2: 'rejected' must be a text, or messages"),
        ([{"chosen": talk, "rejected": talk}], "pair 1: The tokeniser has no chat template"),
        ([{"prompt": "w4", "chosen": talk, "rejected": talk}], "pair 1: 'chosen' must be a text"),
    ]:
        with pytest.raises(BaraError, match=match):
            bara.predict_preferences(model, tokenizer, pairs)
    with pytest.raises(BaraError, match="pair 1: 'chosen' has 5 tokens, over 4"):
        bara.predict_preferences(model, tokenizer, PAIRS, max_length=4)
    wide = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)).eval()
    with pytest.raises(BaraError, match="one output, and this one predicts classes"):
        bara.predict_preferences(wide, tokenizer, PAIRS)


# -- TRL's trainer ---------------------------------------------------------------------------------

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}w9"
ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def trl_trainer(model, tmp_path, pairs=PAIRS, tokenizer=None, mixin=True):
    trl = pytest.importorskip("trl")

    class BayesianRewardTrainer(bara.KLMixin, trl.RewardTrainer):
        pass

    arguments = trl.RewardConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=len(pairs),
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return (BayesianRewardTrainer if mixin else trl.RewardTrainer)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([dict(pair) for pair in pairs]),
        processing_class=tokenizer or word_tokenizer(),
        callbacks=[bara.BayesianCallback()],
    )


def unprepared(**options):
    return reward_model(False, num_observations=None, warmup=0.0, **options)


@pytest.mark.parametrize("messages", [False, True])
def test_trl_reads_the_tokens_that_are_predicted_with(tmp_path, messages, monkeypatch):
    tokenizer, pairs = word_tokenizer(), PAIRS
    if messages:
        tokenizer.chat_template = CHAT
        pairs = [
            {name: [{"role": ROLES[name], "content": text}] for name, text in pair.items()}
            for pair in PAIRS
        ]
    trainer = trl_trainer(unprepared(), tmp_path, pairs, tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    seen = []
    monkeypatch.setattr(
        "bara.language.preferences.predict", lambda _, rows: seen.extend(rows) or scores(rows)
    )
    bara.predict_preferences(trainer.model, tokenizer, pairs)
    assert sorted(row["input_ids"] for row in seen) == sorted(trained)


def scores(rows):
    zeros = torch.zeros(1, len(rows))
    return bara.RegressionPredictive(zeros, zeros)


@pytest.mark.parametrize("mixin", [True, False])
def test_trl_trains_the_elbo_per_pair(tmp_path, mixin):
    """loss(beta) - loss(0) = beta KL / N under the same noise, N the number of pairs."""
    losses = {}
    for weight in (3.0, 0.0):
        model = unprepared(kl_weight=weight, local_kl_weight=0.0)
        trainer = trl_trainer(model, tmp_path, mixin=mixin)
        trainer.train()
        assert model.peft_config["default"].resolved.num_observations == len(PAIRS)
        assert trainer.state.log_history[0]["kl_global"] > 0
        fresh = unprepared(kl_weight=weight, local_kl_weight=0.0)
        fresh.peft_config["default"].resolved.num_observations = len(PAIRS)
        trainer = trl_trainer(fresh, tmp_path)
        batch = next(iter(trainer.get_train_dataloader()))
        fresh.train()
        torch.manual_seed(5)
        losses[weight] = trainer.compute_loss(fresh, dict(batch)).item()
        kl = bara.kl_terms(fresh)["kl_global"]
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * kl / len(PAIRS), rel=1e-3)
