"""Training on multiple choice: packed rows against one full forward for every choice."""

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

import bara
from bara import BaraError
from bara.language.choice_loss import (
    ChoiceCollator,
    choice_nll,
    choice_scores,
    tokenise_choices,
)
from bara.language.question import Question
from bara.language.tasks import LanguageTask
from bara.training.trainer import AdapterTrainer
from helpers import gradients
from language_models import adapted_lm, word_tokenizer, words

RECORDS = [
    {"question": words(4, 5, 6, 7, 8), "choices": [words(9), words(10, 11, 12)], "answer": 1},
    {
        "question": words(13),
        "choices": [words(9, 20), words(10), words(21, 22, 23, 24), words(5)],
        "answer": 2,
    },
    {"question": words(14, 15, 16), "choices": [words(30), words(31), words(32)], "answer": 0},
]
ARCHITECTURES = ["llama", "qwen2", "gpt2", "mixtral"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def packed(tokenizer, records=RECORDS):
    rows = tokenise_choices(
        Dataset.from_list(records), tokenizer, LanguageTask("multiple-choice", max_length=64)
    )
    return ChoiceCollator(tokenizer)(list(rows))


def forward(model, batch):
    read = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    return model(**read)


def scores_by_hand(model, tokenizer, record, draw=None):
    """A forward of prompt and choice for each choice."""
    question, scores = Question.from_record(record), []
    prompt = question.prompt("text")
    start = len(tokenizer(prompt)["input_ids"])
    for completion in question.completions("text"):
        ids = tokenizer(prompt + completion, return_tensors="pt")["input_ids"]
        if draw is None:
            logits = model(input_ids=ids).logits
        else:
            with bara.sampling(model, seed=0, first_draw=draw):
                logits = model(input_ids=ids).logits
        log_probs = logits[0, :-1].log_softmax(-1)
        own = [log_probs[t - 1, ids[0, t]] for t in range(start, ids.shape[1])]
        scores.append(torch.stack(own).mean())
    return torch.stack(scores)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["bara", "balora"])
def test_packed_scores_are_those_of_separate_passes(tokenizer, architecture, method):
    model = adapted_lm(architecture, method).eval()
    batch = packed(tokenizer)
    with torch.no_grad():
        found = choice_scores(forward(model, batch).logits, batch["input_ids"], batch["segments"])
        with bara.sampling(model, num_draws=3, seed=0):  # a draw for each question
            logits = forward(model, batch).logits
        drawn = choice_scores(logits, batch["input_ids"], batch["segments"])
        for row, record in enumerate(RECORDS):
            count = len(record["choices"])
            expected = scores_by_hand(model, tokenizer, record)
            torch.testing.assert_close(found[row, :count], expected, atol=2e-5, rtol=1e-4)
            expected = scores_by_hand(model, tokenizer, record, draw=row)
            torch.testing.assert_close(drawn[row, :count], expected, atol=2e-5, rtol=1e-4)
            assert found[row, count:].isinf().all()
    assert (found - drawn).nan_to_num(0).abs().max() > 1e-3


def test_the_loss_is_that_of_what_multiple_choice_predicts(tokenizer):
    model = adapted_lm().eval()
    batch = packed(tokenizer)
    with torch.no_grad():
        logits = forward(model, batch).logits
    loss = choice_nll(logits, batch["input_ids"], batch["segments"], batch["labels"])
    predictive = bara.multiple_choice(model, tokenizer, RECORDS, deterministic=True)
    expected = cross_entropy(predictive.probs.log(), torch.tensor([1, 2, 0]))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_separate_passes(tokenizer):
    model = adapted_lm().eval()
    batch = packed(tokenizer)
    logits = forward(model, batch).logits
    choice_nll(logits, batch["input_ids"], batch["segments"], batch["labels"]).backward()
    ours = gradients(model)
    model.zero_grad()
    losses = [
        cross_entropy(scores_by_hand(model, tokenizer, r).unsqueeze(0), torch.tensor([r["answer"]]))
        for r in RECORDS
    ]
    torch.stack(losses).mean().backward()
    expected = gradients(model)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-3)


def kl_local(model, batch):
    model.train()
    with bara.sampling(model, seed=0):
        forward(model, batch)
    kl = bara.training.loss.kl_terms(model)["kl_local"]
    model.eval()
    return kl


def test_padding_is_no_part_of_the_kl(tokenizer):
    """The KL of two questions in one padded batch is the mean of theirs alone."""
    model = adapted_lm(local_kl_weight=0.1)
    together = kl_local(model, packed(tokenizer, RECORDS[:2]))
    alone = [kl_local(model, packed(tokenizer, [record])) for record in RECORDS[:2]]
    assert together == pytest.approx(sum(alone) / 2, rel=1e-4)
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_accumulation_and_batch_size_train_the_same(tokenizer, tmp_path, batch_size, accumulation):
    """One step on the mean over four questions, with the KL at its weight of 1 / N."""

    def step(batch_size, accumulation):
        model = adapted_lm(num_observations=None, warmup=0.0, local_kl_weight=0.1).double()
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=1.0,
            max_grad_norm=1e9,
            optim="sgd",
            lr_scheduler_type="constant",
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        rows = tokenise_choices(
            Dataset.from_list([*RECORDS, RECORDS[0]]),
            tokenizer,
            LanguageTask("multiple-choice", max_length=64),
        )
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=ChoiceCollator(tokenizer),
            callbacks=[bara.BayesianCallback()],
        )
        with bara.sampling(model, seed=0):  # the same draw in every batch
            trainer.train()
        assert model.peft_config["default"].resolved.num_observations == 4  # questions, not tokens
        return {n: p.detach() - before[n] for n, p in model.named_parameters() if n in before}

    expected, found = step(4, 1), step(batch_size, accumulation)
    assert max(change.abs().max() for change in expected.values()) > 1e-4
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, atol=1e-9, rtol=1e-7)


def test_refusals(tokenizer):
    task = LanguageTask("multiple-choice", max_length=7)

    def refused(match, *records):
        with pytest.raises(BaraError, match=match):
            tokenise_choices(Dataset.from_list(list(records)), tokenizer, task)

    refused("row 1: the question has no 'answer'", {"question": "w4", "choices": ["w5", "w6"]})
    refused(
        r"row 1 has 8 tokens, more than the 7 of .*\(--max-length",
        {"question": words(4, 5, 6, 7, 8), "choices": ["w9", "w10"], "answer": 0},
    )
    task = LanguageTask("multiple-choice", max_length=64)
    with pytest.raises(BaraError, match="tokens, more than the model's sliding window, 4"):
        tokenise_choices(Dataset.from_list(RECORDS), tokenizer, task, window=4)
    with pytest.raises(BaraError, match="no rows"):
        tokenise_choices(Dataset.from_list([]), tokenizer, task)
