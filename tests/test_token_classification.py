"""A class for every word: words of several tokens, seqeval's scores, sums over draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import BertForTokenClassification, TrainingArguments

import bara
from bara import BaraError, ClassificationPredictive, TokenPredictive
from bara.evaluation.metrics import measure, selection
from bara.prediction.temperature import negative_log_likelihood, set_temperature
from bara.training.callback import count_observations
from conftest import tiny_bert_config
from helpers import CONFIGS, adapt, stir

TAGS = ("O", "B-PER", "I-PER", "B-LOC")
S = 3


@pytest.fixture
def model():
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = tiny_bert_config(num_labels=len(TAGS), **dropout)
    config.id2label = dict(enumerate(TAGS))
    return stir(adapt(BertForTokenClassification(config), task_type="TOKEN_CLS"))


ROWS = [
    {
        "input_ids": [2, 7, 8, 9, 10, 3],
        "attention_mask": [1] * 6,
        "word_ids": [-1, 0, 0, 1, 2, -1],
        "labels": [-100, 1, -100, 2, 0, -100],
    },
    {
        "input_ids": [2, 11, 12, 13, 3],
        "attention_mask": [1] * 5,
        "word_ids": [-1, 0, 0, 0, -1],
        "labels": [-100, 3, -100, -100, -100],
    },
    {
        "input_ids": [2, 5, 6, 7, 8, 9, 10, 3],
        "attention_mask": [1] * 8,
        "word_ids": [-1, 0, 1, 1, 2, 3, 3, -1],
        "labels": [-100, 0, 1, -100, 2, -100, -100, -100],
    },
]
WORDS = [3, 1, 4]


def token_probs(model, row: dict[str, list[int]], draw: int) -> torch.Tensor:
    """(T, C) of one input under one draw, alone in its batch."""
    inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), bara.sampling(model.eval(), seed=4, first_draw=draw):
        return model(**inputs).logits[0].softmax(-1)


def by_hand(model, how: str) -> torch.Tensor:
    """(S, W, C) of the words, row by row and word by word."""
    draws = []
    for draw in range(S):
        words = []
        for row in ROWS:
            probs = token_probs(model, row, draw)
            for word in range(max(row["word_ids"]) + 1):
                places = [i for i, w in enumerate(row["word_ids"]) if w == word]
                if how == "tokens":
                    words += probs[places]
                else:
                    words.append(probs[places[0]] if how == "first" else probs[places].mean(0))
        draws.append(torch.stack(words))
    return torch.stack(draws)


@pytest.mark.parametrize("how", ["first", "mean", "tokens"])
@pytest.mark.parametrize("batch_size", [64, 4])
def test_words_have_the_probabilities_of_their_tokens(model, how, batch_size):
    predictive = bara.predict(model, ROWS, num_draws=S, seed=4, words=how, batch_size=batch_size)
    probs = predictive.words.log_probs_draws.exp()
    torch.testing.assert_close(probs, by_hand(model, how), atol=1e-5, rtol=1e-4)
    if how == "tokens":
        assert predictive.lengths.tolist() == [4, 3, 6]
        labels = [1, -100, 2, 0, 3, -100, -100, 0, 1, -100, 2, -100, -100]
        assert predictive.labels.tolist() == labels
    else:
        assert predictive.lengths.tolist() == WORDS
        assert predictive.labels.tolist() == [1, 2, 0, 3, 0, 1, 2, -100]
    assert predictive.words.label_names == TAGS


@pytest.mark.parametrize("how", ["first", "mean", "tokens"])
def test_a_fitted_temperature_gives_the_likelihood_that_it_was_fitted_for(model, how):
    options = {"num_draws": S, "seed": 4, "words": how}
    plain = bara.predict(model, ROWS, **options)
    set_temperature(model, 0.3)
    tempered = bara.predict(model, ROWS, **options)
    expected = negative_log_likelihood(plain, 0.3).item()
    assert negative_log_likelihood(tempered).item() == pytest.approx(expected, rel=1e-5)


def test_without_words_they_are_the_labelled_tokens_or_all(model):
    def without(*names):
        return [{k: v for k, v in row.items() if k not in names} for row in ROWS]

    labelled = bara.predict(model, without("word_ids"), num_draws=S, seed=4)
    assert labelled.lengths.tolist() == [3, 1, 3]
    assert labelled.labels.tolist() == [1, 2, 0, 3, 0, 1, 2]
    every = bara.predict(model, without("word_ids", "labels"), num_draws=S, seed=4)
    assert every.lengths.tolist() == [6, 5, 8]
    assert every.labels is None
    torch.testing.assert_close(
        every.split()[1].log_probs_draws[2].exp(),
        token_probs(model, ROWS[1], 2),
        atol=1e-5,
        rtol=1e-4,
    )


def test_a_whole_text_is_right_by_the_product_under_each_draw(model):
    predictive = bara.predict(model, ROWS, num_draws=S, seed=4)
    for i, part in enumerate(predictive.split()):
        chosen = part.prediction.tolist()
        products = [
            math.prod(part.log_probs_draws[s, w, c].exp().item() for w, c in enumerate(chosen))
            for s in range(S)
        ]
        assert predictive.confidence[i].item() == pytest.approx(sum(products) / S, rel=1e-4)
    _, errors = selection(predictive)
    predicted, right = predictive.words.prediction.tolist(), predictive.labels.tolist()
    wrong = [p != r and r != -100 for p, r in zip(predicted, right, strict=True)]
    assert errors.tolist() == [float(any(wrong[a:b])) for a, b in ((0, 3), (3, 4), (4, 8))]


def test_a_text_without_a_label_is_no_right_answer():
    """It would count as one in the calibration of a threshold, whose promise is about errors."""
    labels = torch.tensor([0, 1, -100, -100])
    log_probs = torch.randn(S, 4, len(TAGS)).log_softmax(-1)
    words = ClassificationPredictive(log_probs, labels, TAGS)
    with pytest.raises(BaraError, match="input number 1 has no word with a label"):
        selection(TokenPredictive(words, torch.tensor([2, 2])))


def certain(tags: list[str], right: list[str]) -> tuple[torch.Tensor, list[int]]:
    probs = torch.full((len(tags), len(TAGS)), 0.1 / 3)
    for row, tag in enumerate(tags):
        probs[row, TAGS.index(tag)] = 0.9
    return probs, [TAGS.index(tag) for tag in right]


def test_entities_are_counted_whole():
    """Of 4 entities 2 are found with their words and type, and 3 are predicted."""
    first = ["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "I-PER", "O", "B-PER"]
    second = ["B-LOC", "O", "O"], ["B-LOC", "O", "B-PER"]
    probs, labels = zip(certain(*first), certain(*second), strict=True)
    words = ClassificationPredictive(
        torch.cat(probs).log().unsqueeze(0), torch.tensor(labels[0] + labels[1]), TAGS
    )
    evaluation = measure(TokenPredictive(words, torch.tensor([4, 3])))
    metrics = evaluation.to_dict()
    assert metrics["precision"] == pytest.approx(2 / 3)
    assert metrics["recall"] == pytest.approx(2 / 4)
    assert metrics["f1"] == pytest.approx(4 / 7)
    assert metrics["accuracy"] == pytest.approx(5 / 7)
    assert metrics["ece"] == pytest.approx(0.9 - 5 / 7, abs=1e-6)
    nll = -(5 * math.log(0.9) + 2 * math.log(0.1 / 3)) / 7
    assert metrics["nll"] == pytest.approx(nll, abs=1e-6)
    assert evaluation.by_label["PER"] == pytest.approx(
        {"precision": 1.0, "recall": 1 / 3, "f1": 0.5, "support": 3}
    )
    assert evaluation.by_label["LOC"]["precision"] == pytest.approx(0.5)


def test_last_and_unit_words_end_an_entity():
    """Two neighbours of one type are two, as BIOES has them by its own names."""
    tags = ("O", "B-PER", "L-PER", "U-PER")
    right, found = [3, 3, 1, 2, 0], [3, 0, 1, 2, 0]
    probs = torch.full((5, 4), 0.02)
    probs[range(5), found] = 0.94
    words = ClassificationPredictive(probs.log().unsqueeze(0), torch.tensor(right), tags)
    evaluation = measure(TokenPredictive(words, torch.tensor([5])))
    assert evaluation.by_label["PER"] == pytest.approx(
        {"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3}
    )


def test_tags_that_mark_no_entities_have_no_entity_scores():
    words = ClassificationPredictive(
        torch.zeros(1, 3, 2).log_softmax(-1), torch.tensor([0, 1, -100]), ("NOUN", "VERB")
    )
    evaluation = measure(TokenPredictive(words, torch.tensor([3])))
    assert "f1" not in evaluation.metrics
    assert evaluation.by_label is None
    assert evaluation.metrics["nll"] == pytest.approx(math.log(2))
    assert negative_log_likelihood(evaluation.predictive).item() == pytest.approx(math.log(2))


def test_records_and_the_table_are_by_word(model):
    predictive = bara.predict(model, ROWS, num_draws=S, seed=4)
    names = tuple(tuple(f"w{i}" for i in range(n)) for n in WORDS)
    named = TokenPredictive(predictive.words, predictive.lengths, names)
    records = named.to_records()
    assert [len(record["words"]) for record in records] == WORDS
    assert records[2]["words"][3]["word"] == "w3"
    frame = named.to_frame()
    assert frame["input"].tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert frame["word"].tolist() == [word for words in names for word in words]
    assert frame["label"].tolist()[:4] == ["B-PER", "I-PER", "O", "B-LOC"]
    assert frame["epistemic"].tolist() == predictive.words.epistemic_uncertainty.tolist()
    chosen = named.select([2, 0])
    assert chosen.texts == (names[2], names[0])
    assert chosen.to_records() == [records[2], records[0]]


def test_the_loss_is_the_elbo_per_labelled_word(model, tmp_path):
    columns = {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in ROWS], True)
        for name in ("input_ids", "attention_mask")
    }
    labels = torch.full((3, 8), -100)
    labels[:, 1], labels[:, 3] = 2, 0  # as many in each row, so that the rows' KL count alike
    model.train()
    with bara.sampling(model, seed=3):
        loss = model(**columns, labels=labels).loss
        logits = model(**columns).logits
        kl = bara.kl_loss(model)
    nll = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert kl > 0
    torch.testing.assert_close(loss, nll + kl, rtol=1e-5, atol=1e-5)
    rows = [{name: value[i] for name, value in columns.items()} for i in range(3)]
    rows = [{**row, "labels": labels[i]} for i, row in enumerate(rows)]
    loader = DataLoader(rows, batch_size=2)
    assert count_observations(loader, model, 3, TrainingArguments(str(tmp_path))) == 6


@pytest.mark.parametrize("method", CONFIGS)
def test_the_head_is_saved_with_the_adapter(method, tmp_path):
    from peft import PeftModel

    def base():
        torch.manual_seed(0)
        return BertForTokenClassification(tiny_bert_config(num_labels=len(TAGS)))

    saved = stir(adapt(base(), method, task_type="TOKEN_CLS", target_modules="all-linear"))
    saved.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert "classifier" in saved.peft_config["default"].modules_to_save
    first, second = (bara.predict(m, ROWS, num_draws=2) for m in (saved, loaded))
    torch.testing.assert_close(first.words.log_probs_draws, second.words.log_probs_draws)
    other = base()
    assert not torch.equal(
        loaded.get_base_model().classifier.modules_to_save["default"].weight,
        other.classifier.weight,
    )


def test_logits_of_a_language_model_are_refused():
    from helpers import tiny_llama

    with pytest.raises(BaraError, match="logits of shape"):
        bara.predict(tiny_llama(), {"input_ids": torch.ones(2, 4, dtype=torch.long)})
    with pytest.raises(BaraError, match="words must be"):
        bara.predict(tiny_llama(), {"input_ids": torch.ones(2, 4)}, words="last")
