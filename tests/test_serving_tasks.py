"""`bara serve` for labels, tags and answers: what it says is what `bara predict` writes."""

import json

import pytest

pytest.importorskip("fastapi")

import httpx

import bara
from bara.evaluation.abstention import Threshold, save_threshold
from bara.serving.app import create_app
from bara.serving.limits import Limits
from bara.serving.served import load_served
from conftest import write_jsonl
from serving import running

LIMITS = Limits(texts=4, draws=16, rows=64, seconds=20)
QUESTIONS = [
    {
        "question": "the film is",
        "context": "the film was good . it is a fine plot , not a poor one",
    },
    {"question": "the plot is", "context": "warm food"},
]
INPUTS = {
    "labels": ("texts", ["good film", "a bad plot", "it was cold"]),
    "tags": ("tokens", [["goodfilm", "was", "."], ["cold"], ["a", "bad", "plot", "!"]]),
    "answers": ("questions", QUESTIONS),
}


@pytest.fixture(scope="module")
def served(task_folders):
    return {one.name: one for one in load_served([str(f) for f in task_folders.values()])}


@pytest.fixture(scope="module")
def client(served):
    app = create_app(list(served.values()), limits=LIMITS)
    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def rows_of(name):
    """The inputs as a table for `bara predict`."""
    _, inputs = INPUTS[name]
    column = {"labels": "text", "tags": "tokens"}.get(name)
    return inputs if column is None else [{column: one} for one in inputs]


def nearly(value):
    """The same up to the rounding of batches of another shape."""
    if isinstance(value, dict):
        return {name: nearly(part) for name, part in value.items()}
    if isinstance(value, list):
        return [nearly(part) for part in value]
    return pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value


def ask(client, name, **more):
    field, inputs = INPUTS[name]
    answer = client.post("/v1/predict", json={"model": name, field: inputs} | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("name", INPUTS)
def test_an_answer_is_what_the_command_writes(client, served, name, run, tmp_path):
    table = write_jsonl(tmp_path / "table.jsonl", rows_of(name))
    options = ["--data", table, "--num-draws", 3, "--seed", 7]
    lines = run("predict", served[name].folder, *options).splitlines()
    answer = ask(client, name, num_draws=3, seed=7)
    assert answer["predictions"] == nearly([json.loads(line) for line in lines])
    assert answer["task"] == served[name].task.task
    assert answer["num_draws"] == 3
    assert answer["predictions"] != ask(client, name, num_draws=3, seed=8)["predictions"]
    assert f'bara_epistemic_count{{model="{name}"}}' in client.get("/metrics").text


@pytest.mark.parametrize("name", INPUTS)
def test_abstaining(client, served, name):
    sure = [p["confidence"] for p in ask(client, name, num_draws=3)["predictions"]]
    middle = sum(sorted(1 - s for s in sure)[:2]) / 2
    threshold = Threshold(middle, 0.2, 0.1, 0.5, 100)
    save_threshold(served[name].folder, threshold, measure="predictions", num_draws=3, seed=0)
    answer = ask(client, name, num_draws=3, abstain_at_risk=0.2)["predictions"]
    declined = [1 - s > middle for s in sure]
    assert [p["abstained"] for p in answer] == declined
    assert [p["prediction"] is None for p in answer] == declined
    assert len(set(declined)) == 2


@pytest.mark.parametrize("name", INPUTS)
def test_the_rank_is_that_of_effective_rank(client, served, name):
    """Of a question the mean over the windows of its context."""
    one, (field, inputs) = served[name], INPUTS[name]
    answer = client.post("/v1/rank", json={"model": name, field: inputs[:1]}).json()
    asked = {"labels": inputs[:1], "tags": [inputs[0]], "answers": None}[name]
    if asked is None:
        data = bara.question_windows(
            inputs[:1], one.tokenizer, max_length=16, stride=4, labels=False
        )
        assert len(data) > 1
    else:
        encoded = one.tokenizer(asked, is_split_into_words=name == "tags", return_tensors="pt")
        data = dict(encoded)
    rank = bara.effective_rank(one.model, data, progress=False)
    assert answer["mean"] == pytest.approx(rank.s_bar, rel=1e-4)


def test_every_question_keeps_its_windows(client, served):
    together = ask(client, "answers", num_draws=2)["predictions"]
    for question, record in zip(QUESTIONS, together, strict=True):
        alone = {"model": "answers", "questions": [question], "num_draws": 2}
        (found,) = client.post("/v1/predict", json=alone).json()["predictions"]
        assert found == nearly(record)
        text = record["prediction"]
        assert text == (
            "" if record["start"] is None else question["context"][record["start"] : record["end"]]
        )
    assert served["answers"].task.unanswerable


def test_the_list_of_models_says_what_they_read(client):
    data = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert {name: model["reads"] for name, model in data.items()} == {
        name: field for name, (field, _) in INPUTS.items()
    }
    assert data["labels"]["classes"] == ["film", "praise"]
    assert data["tags"]["classes"] == ["B", "O"]
    assert data["answers"]["classes"] == []


LONG = " ".join(["it was cold ."] * 40)
BAD = [
    ("labels", {"tokens": [["a"]]}, "labels reads texts, not tokens"),
    ("tags", {"texts": ["a"]}, "tags reads tokens, not texts"),
    ("answers", {"pairs": [["a", "b"]]}, "answers reads questions, not pairs"),
    ("answers", {}, "questions is missing"),
    ("tags", {"tokens": [[]]}, "tokens.0 must be a list of 1 or more"),
    ("tags", {"tokens": [["a"], ["b", " "]]}, "tokens.1 is empty"),
    ("tags", {"tokens": [["a"], [3]]}, "tokens.1.0 must be text, not 3"),
    ("tags", {"tokens": [["a"], ["a"] * 200]}, "tokens.1 has 202 tokens, more than the 64"),
    ("tags", {"tokens": [["a", "\u200b"]]}, "is nothing to the tokeniser"),
    ("answers", {"questions": [{"question": "a"}]}, "questions.0.context is missing"),
    ("answers", {"questions": [{"question": " ", "context": "a"}]}, "questions.0 is empty"),
    ("answers", {"questions": [{"question": "a", "context": "b", "x": 1}]}, "questions.0.x is not"),
    ("answers", {"questions": [{"question": "a " * 20, "context": "b"}]}, "questions.0: the quest"),
    ("answers", {"questions": [{"question": "a", "context": LONG}]}, "windows, and with 10 draws"),
    ("answers", {"questions": QUESTIONS, "coverage": 0.9}, "coverage is for classification"),
    ("tags", {"tokens": [["a"]] * 5}, "tokens: at most 4 here, not 5"),
]


@pytest.mark.parametrize(("name", "body", "words"), BAD, ids=[words for *_, words in BAD])
def test_bad_requests_are_the_client_s_fault(client, name, body, words):
    answer = client.post("/v1/predict", json={"model": name} | body)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
