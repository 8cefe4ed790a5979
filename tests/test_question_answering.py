"""Spans under the mixture over draws, against enumeration of all spans of all windows."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import BertForQuestionAnswering, TrainingArguments

import bara
from bara import BaraError, SpanPredictive, question_windows
from bara.data.questions import Passage
from bara.evaluation.difference import difference
from bara.evaluation.metrics import measure, selection
from bara.prediction.batches import pad_rows
from bara.prediction.spans import Window
from bara.training.callback import count_observations
from conftest import tiny_bert_config
from helpers import CONFIGS, adapt, stir

S = 3
CONTEXT = "the film was good , the plot was poor . it is not great food"
TABLE = [
    {
        "question": "it is",
        "context": CONTEXT,
        "answers": {"text": ["not great", "great"], "answer_start": [46, 50]},
    },
    {
        "question": "the plot was",
        "context": CONTEXT[:39],
        "answers": {"text": ["poor"], "answer_start": [33]},
    },
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = tiny_bert_config(**dropout)
    return stir(adapt(BertForQuestionAnswering(config), task_type="QUESTION_ANS"))


def windows(tokenizer, **options):
    return question_windows(TABLE, tokenizer, max_length=14, stride=3, **options)


def test_windows_cover_the_context_and_know_the_answers(tiny_tokenizer):
    data = windows(tiny_tokenizer)
    seen: dict[int, set[int]] = {}
    for row in data:
        question, begins, first, length, no_answer = row["place"]
        passage = data.passages[question]
        seen.setdefault(question, set()).update(range(first, first + length))
        assert len(row["input_ids"]) <= 14
        assert tiny_tokenizer.convert_ids_to_tokens(row["input_ids"][no_answer]) == "[CLS]"
        words = tiny_tokenizer.convert_ids_to_tokens(row["input_ids"][begins : begins + length])
        assert words == [passage.text((i, i)) for i in range(first, first + length)]
        start, end = row["start_positions"], row["end_positions"]
        if start:
            said = words[start - begins : end - begins + 1]
            assert " ".join(said) == TABLE[question]["answers"]["text"][0]
    assert seen == {0: set(range(15)), 1: set(range(10))}
    assert len(data) > 2
    assert data.passages[0].answers == ((12, 13), (13, 13))
    assert sum(row["start_positions"] > 0 for row in data) >= 2


def spans_by_hand(model, data, question: int, draw: int) -> dict[tuple[int, int] | None, float]:
    """Probability of every span: windows one by one, the best score of each span, normalised."""
    scores: dict[tuple[int, int] | None, float] = {}
    for row in data:
        number, begins, first, length, no_answer = row["place"]
        if number != question:
            continue
        inputs = {
            name: torch.tensor([row[name]])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        with torch.no_grad(), bara.sampling(model.eval(), seed=2, first_draw=draw):
            output = model(**inputs)
        start, end = output.start_logits[0].double(), output.end_logits[0].double()
        for i in range(length):
            for j in range(i, length):
                score = float(start[begins + i] + end[begins + j])
                span = (first + i, first + j)
                scores[span] = max(score, scores.get(span, -math.inf))
        none = float(start[no_answer] + end[no_answer])
        scores[None] = min(none, scores.get(None, math.inf))
    if not data.unanswerable:
        del scores[None]
    total = sum(map(math.exp, scores.values()))
    return {span: math.exp(score) / total for span, score in scores.items()}


@pytest.mark.parametrize("unanswerable", [False, True])
@pytest.mark.parametrize("batch_size", [64, 2])
def test_answers_are_those_of_enumeration(model, tiny_tokenizer, unanswerable, batch_size):
    data = windows(tiny_tokenizer, unanswerable=unanswerable, max_answer_length=2)
    predictive = bara.predict(model, data, num_draws=S, seed=2, batch_size=batch_size)
    records = predictive.to_records()
    for question, row in enumerate(TABLE):
        draws = [spans_by_hand(model, data, question, draw) for draw in range(S)]
        mean = {span: sum(draw[span] for draw in draws) / S for span in draws[0]}
        allowed = {s: p for s, p in mean.items() if s is None or s[1] - s[0] < 2}
        best = sorted(allowed, key=allowed.__getitem__, reverse=True)[:5]
        answer, record = predictive.answers[question], records[question]
        assert list(answer.spans) == best
        assert [math.exp(p) for p in answer.log_probs] == pytest.approx(
            [mean[span] for span in best], rel=1e-4
        )
        total = -sum(p * math.log(p) for p in mean.values())
        aleatoric = -sum(p * math.log(p) for draw in draws for p in draw.values()) / S
        assert record["total"] == pytest.approx(total, rel=1e-4)
        assert record["epistemic"] == pytest.approx(total - aleatoric, abs=1e-4)
        assert record["confidence"] == pytest.approx(mean[best[0]], rel=1e-4)
        right = sum(mean[span] for span in data.passages[question].answers)
        assert predictive.label_log_prob[question].item() == pytest.approx(
            math.log(right), rel=1e-4
        )
        if best[0] is not None:
            words = row["context"].split()[best[0][0] : best[0][1] + 1]
            assert record["prediction"] == " ".join(words)
            assert row["context"][record["start"] : record["end"]] == record["prediction"]


def made_up(answers: list[tuple[str, ...]], scores: list[list[float]]) -> SpanPredictive:
    """One window of four one-word tokens, "the cat sat down", one draw: scores of the words."""
    context = "the cat sat down"
    offsets = ((0, 3), (4, 7), (8, 11), (12, 16))
    found, passages = [], []
    for texts, score in zip(answers, scores, strict=True):
        logits = torch.tensor(score).view(1, 4, 1).expand(1, 4, 2)
        found.append((Window(0, logits, torch.tensor([-9.0])),))
        spans = []
        for text in texts:
            start = context.index(text)
            touched = [i for i, (a, b) in enumerate(offsets) if a < start + len(text) and b > start]
            spans.append((touched[0], touched[-1]))
        passages.append(Passage(context, offsets, tuple(spans), texts))
    return SpanPredictive(tuple(found), tuple(passages), unanswerable=True)


def test_exact_match_and_f1_are_squad_s():
    """ "cat" is exact; "the cat" is, but for its article; "sat" has one of two words; and there is
    an answer where there should be none."""
    cat, sat = [0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0]
    predictive = made_up([("cat",), ("the cat",), ("sat down",), ()], [cat, cat, sat, sat])
    assert predictive.prediction == ["cat", "cat", "sat", "sat"]
    metrics = measure(predictive).to_dict()
    assert metrics["exact_match"] == pytest.approx(2 / 4)
    assert metrics["f1"] == pytest.approx((1 + 1 + 2 / 3 + 0) / 4)
    uncertainty, errors = selection(predictive)
    assert errors.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(uncertainty, 1 - predictive.confidence)
    assert metrics["ece"] == pytest.approx(abs(predictive.confidence.mean().item() - 0.5), abs=1e-5)
    right = [predictive.label_log_prob[i].item() for i in range(4)]
    assert metrics["nll"] == pytest.approx(-sum(right) / 4)
    # no answer scores -9, each span the sum of its ends
    every = [sat[i] + sat[j] for i in range(4) for j in range(i, 4)] + [-9.0]
    assert right[3] == pytest.approx(-9 - math.log(sum(map(math.exp, every))), abs=1e-4)
    best_is_none = made_up([()], [[-9.0] * 4])
    assert best_is_none.prediction == [""]
    assert best_is_none.to_records()[0]["start"] is None
    assert measure(best_is_none).metrics["exact_match"] == 1


def test_a_further_reference_that_no_window_holds_has_no_probability():
    """Windows of two and of three words; the second reference has all four."""
    short, long = ((0, 0), (0, 3)), ("the", "the cat sat down")
    offsets = ((0, 3), (4, 7), (8, 11), (12, 16))
    windows = [Window(0, torch.zeros(1, 2, 2), torch.zeros(1))]
    windows += [Window(1, torch.zeros(1, 3, 2), torch.zeros(1))]
    passage = Passage("the cat sat down", offsets, short, long)
    predictive = SpanPredictive((tuple(windows),), (passage,))
    # spans of (first, last) word: 00 01 11 of the one, 11 12 13 22 23 33 of the other
    assert predictive.label_log_prob.item() == pytest.approx(math.log(1 / 8))


def test_records_the_table_and_selection_go_by_question(model, tiny_tokenizer):
    data = windows(tiny_tokenizer)
    predictive = bara.predict(model, data, num_draws=S, seed=2)
    frame = predictive.to_frame()
    assert frame["prediction"].tolist() == predictive.prediction
    assert frame["label"].tolist() == [("not great", "great"), ("poor",)]
    assert predictive.select([1]).to_records() == predictive.to_records()[1:]
    assert difference(predictive, predictive).largest == 0
    other = bara.predict(model, data, deterministic=True)
    assert 0 < difference(predictive, other).largest <= 1


def test_the_loss_is_half_the_elbo_per_window(model, tiny_tokenizer, tmp_path):
    """The model's own loss is the mean of start and end: so is the KL."""
    data = windows(tiny_tokenizer)
    rows = [{k: torch.tensor(v) for k, v in row.items() if k != "place"} for row in data]
    rows = [row for row in rows if len(row["input_ids"]) == len(rows[0]["input_ids"])]
    loader = DataLoader(rows, batch_size=len(rows))
    assert count_observations(loader, model, 3, TrainingArguments(str(tmp_path))) == len(rows)
    batch = next(iter(loader))
    model.train()
    with bara.sampling(model, seed=3):
        loss = model(**batch).loss
        start, end = batch.pop("start_positions"), batch.pop("end_positions")
        output = model(**batch)
        kl = bara.kl_loss(model)
    nll = cross_entropy(output.start_logits, start) + cross_entropy(output.end_logits, end)
    assert kl > 0
    torch.testing.assert_close(2 * loss, nll + kl, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_the_head_is_saved_with_the_adapter(method, tiny_tokenizer, tmp_path):
    from peft import PeftModel

    def base():
        torch.manual_seed(0)
        return BertForQuestionAnswering(tiny_bert_config())

    saved = stir(adapt(base(), method, task_type="QUESTION_ANS", target_modules="all-linear"))
    saved.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    head = loaded.get_base_model().qa_outputs.modules_to_save["default"]
    assert not torch.equal(head.weight, base().qa_outputs.weight)
    data = windows(tiny_tokenizer)
    first, second = (bara.predict(m, data, num_draws=2).to_records() for m in (saved, loaded))
    assert first == second


def test_what_does_not_fit_is_refused(model, tiny_tokenizer):
    with pytest.raises(BaraError, match="question_windows"):
        bara.predict(model, {"input_ids": torch.ones(2, 4, dtype=torch.long)})
    from transformers import BertForSequenceClassification

    classifier = BertForSequenceClassification(tiny_bert_config())
    with pytest.raises(BaraError, match="start_logits"):
        bara.predict(classifier, windows(tiny_tokenizer))
    unlabelled = windows(tiny_tokenizer, labels=False)
    with pytest.raises(BaraError, match="metrics need labels"):
        bara.evaluate(model, unlabelled, num_draws=1)
    none = [{**TABLE[0], "answers": {"text": [], "answer_start": []}}]
    with pytest.raises(BaraError, match="row 1 has no answer"):
        question_windows(none, tiny_tokenizer, max_length=14, stride=3, unanswerable=False)
    assert question_windows(none, tiny_tokenizer, max_length=14, stride=3).unanswerable


def test_answers_that_were_learned_are_found(tiny_tokenizer):
    """From the characters of a table to the labels of windows, and back to its characters."""
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForQuestionAnswering(tiny_bert_config(initializer_range=0.3, **dropout))
    data = windows(tiny_tokenizer)
    rows = [{k: v for k, v in row.items() if k != "place"} for row in data]
    batch = pad_rows(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    predictive = bara.predict(model, data)
    assert predictive.prediction == ["not great", "poor"]
    assert measure(predictive).metrics["exact_match"] == 1
