"""bara.multiple_choice against one full forward per draw and choice."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3Config

import bara
from bara import BaraError
from bara.evaluation.metrics import classification_metrics
from bara.language.prompts import context
from bara.language.question import LETTERS, Question
from helpers import adapt, stir
from language_models import adapted_lm, lora_ensemble, word_tokenizer, words

QUESTIONS = [
    {"question": words(4, 5, 6, 7, 8), "choices": [words(9), words(10, 11, 12)], "answer": 1},
    {
        "question": words(13),
        "choices": [words(9, 20), words(10), words(21, 22, 23, 24), words(5)],
        "answer": "C",
    },
    {
        "question": words(14, 15, 16),
        "choices": [words(30), words(31), words(32)],
        "answer": words(31),
    },
]


@pytest.fixture(scope="module")
def tokenizer():
    """Question:, Answer: and the letters are unknown words to it, that is w3, but for A to E."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(list("ABCDE"))
    return tokenizer


def fit(model, tokenizer):
    model.get_base_model().resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


@torch.no_grad()
def by_hand(model, tokenizer, scoring, num_draws, seed=0):
    """(S, n, C) probabilities; a forward of prompt and choice for each."""
    result = torch.zeros(num_draws, len(QUESTIONS), 4)
    for i, record in enumerate(QUESTIONS):
        question = Question.from_record(record)
        prompt = question.prompt(scoring)
        start = len(tokenizer(prompt)["input_ids"])
        for draw in range(num_draws):
            scores = []
            for completion in question.completions(scoring):
                ids = tokenizer(prompt + completion, return_tensors="pt")["input_ids"]
                with bara.sampling(model, seed=seed, first_draw=draw):
                    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                own = [log_probs[t - 1, ids[0, t]] for t in range(start, ids.shape[1])]
                scores.append(torch.stack(own).mean())
            result[draw, i, : len(scores)] = torch.stack(scores).softmax(0)
    return result


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "mixtral"])
@pytest.mark.parametrize("scoring", ["text", "letter"])
def test_equal_to_a_full_forward_per_draw_and_choice(tokenizer, architecture, scoring):
    model = fit(adapted_lm(architecture), tokenizer)
    predictive = bara.multiple_choice(model, tokenizer, QUESTIONS, scoring=scoring, num_draws=3)
    expected = by_hand(model, tokenizer, scoring, 3)
    torch.testing.assert_close(predictive.log_probs_draws.exp(), expected, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(predictive.probs, expected.mean(0), atol=2e-5, rtol=1e-3)
    assert expected.std(0)[expected[0] > 0].max() > 1e-3
    assert predictive.labels.tolist() == [1, 2, 1]
    assert predictive.label_names == ("A", "B", "C", "D")
    assert 0 <= classification_metrics(predictive)["accuracy"] <= 1


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_the_batch_size_changes_nothing(tokenizer, batch_size):
    model = fit(adapted_lm(method="balora"), tokenizer)
    whole = bara.multiple_choice(model, tokenizer, QUESTIONS, num_draws=4)
    parts = bara.multiple_choice(model, tokenizer, QUESTIONS, num_draws=4, batch_size=batch_size)
    torch.testing.assert_close(
        parts.log_probs_draws.exp(), whole.log_probs_draws.exp(), atol=2e-5, rtol=1e-3
    )


def test_prompts_are_encoded_once_per_draw(tokenizer):
    """Tokens that enter the model: every prompt once, and every choice but for its last token."""
    model = fit(adapted_lm(), tokenizer)
    seen = []
    handle = (
        model.get_base_model()
        .get_input_embeddings()
        .register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    )
    record = {"question": words(*range(4, 24)), "choices": [words(5, 6), words(7, 8), words(9)]}
    bara.multiple_choice(model, tokenizer, [record], num_draws=2)
    assert seen == [(2, 23), (6, 1)]  # the tokeniser makes two of "Answer:"
    seen.clear()
    record["choices"].append(words(*range(10, 16)))
    bara.multiple_choice(model, tokenizer, [record], num_draws=2, batch_size=4)
    handle.remove()
    assert seen == [(2, 23), (4, 1), (4, 5)]  # the long choice makes one other longer, not all


def test_mean_mode(tokenizer):
    model = fit(adapted_lm(), tokenizer)
    mean = bara.multiple_choice(model, tokenizer, QUESTIONS, deterministic=True)
    assert mean.num_draws == 1
    with model.disable_adapter():
        plain = model.get_base_model()
        disabled = bara.multiple_choice(plain, tokenizer, QUESTIONS, num_draws=2)
    assert not torch.allclose(mean.probs, disabled.probs)


def test_answers_as_index_letter_or_text():
    assert [Question.from_record(record).answer for record in QUESTIONS] == [1, 2, 1]
    assert Question.from_record({"question": "x", "choices": ["a", "b"]}).answer is None
    twice = {"question": "x", "choices": ["a", "b", "b"], "answer": "a"}  # OpenBookQA has such
    assert Question.from_record(twice).answer == 0
    assert Question.from_record(twice | {"answer": 2}).answer == 2
    assert len(LETTERS) == 26


def test_a_prompt_is_read_word_for_word():
    record = {"prompt": "w5  w6\n", "choices": ["a", "b"], "answer": "B"}
    question = Question.from_record(record)
    assert question.prompt("text") == question.prompt("letter") == "w5  w6\n"
    assert question.completions("text") == [" a", " b"]
    assert question.answer == 1


def test_bad_input_is_one_clear_line(tokenizer, tiny_bert):
    model = fit(adapted_lm(), tokenizer)

    def refused(match, questions=QUESTIONS, model=model, **options):
        with pytest.raises(BaraError, match=match):
            bara.multiple_choice(model, tokenizer, questions, **options)

    refused("no question", [])
    refused("Question number 0 needs a text under 'question'", [{"choices": ["a", "b"]}])
    refused("list of texts under 'choices'", [{"question": "a", "choices": "ab"}])
    refused("2 to 26 choices", [{"question": "a", "choices": ["b"]}])
    refused("text of one of", [{"question": "a", "choices": ["b", "b", "c"], "answer": "b"}])
    for answer in (float("nan"), float("inf"), 0.5):
        rows = [{"question": "a", "choices": ["b", "c"], "answer": answer}]
        refused(f"answer {answer}, which is no index from 0 to 1", rows)
    refused(
        "answer 4, which is no index from 0 to 1",
        [{"question": "a", "choices": ["b", "c"], "answer": 4}],
    )
    refused(
        "does not fit the model's context of 64",
        [{"question": words(*range(3, 63), 4, 5), "choices": [words(3), words(4)]}],
    )
    refused("scoring must be", scoring="best")
    refused("must be at least 1", num_draws=0)
    refused("cannot generate", model=stir(adapt(tiny_bert, task_type="SEQ_CLS")))
    broken = fit(adapted_lm(), tokenizer)
    broken.get_base_model().lm_head.weight.data[5] = float("nan")
    refused("not finite", model=broken)


def test_the_members_of_an_ensemble_answer_as_its_draws(tokenizer):
    model = fit(lora_ensemble(3), tokenizer)
    predictive = bara.multiple_choice(model, tokenizer, QUESTIONS, num_draws=2)
    assert predictive.num_draws == 3  # as many as there are
    expected = by_hand(model, tokenizer, "text", 3)
    torch.testing.assert_close(predictive.log_probs_draws.exp(), expected, atol=1e-5, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.01


def test_the_context_of_a_model_that_reads_images_too_is_its_language_models():
    config = Gemma3Config(text_config={"max_position_embeddings": 48})
    assert not hasattr(config, "max_position_embeddings")
    assert context(SimpleNamespace(config=config)) == 48
