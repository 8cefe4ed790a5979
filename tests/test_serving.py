"""`bara serve`: predictions equal `bara.predict`, and every bad request has one clear answer."""

import json
import math
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx
import torch

import bara
from bara.data.text_task import encode_texts
from bara.evaluation.abstention import FILE as THRESHOLDS
from bara.evaluation.abstention import Threshold, save_threshold
from bara.evaluation.conformal import FILE, Conformal, save_conformal
from bara.serving import prediction
from bara.serving.app import create_app
from bara.serving.limits import Limits
from bara.serving.served import load_served, share_parameters
from bara.serving.server import read_key
from conftest import write_jsonl
from language_models import words
from serving import TEXTS, held_predictions, make_adapter, running

LIMITS = Limits(body=20_000, texts=4, tokens=30, draws=16, seconds=20)
KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def served(served_folders):
    return {one.name: one for one in load_served([str(f) for f in served_folders.values()])}


@pytest.fixture(scope="module")
def client(served):
    app = create_app(list(served.values()), limits=LIMITS)
    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def expected(one, texts, **options):
    """Records of `bara.predict`, asked for these texts alone."""
    columns = encode_texts(
        [list(part) for part in zip(*texts, strict=True)], one.tokenizer, one.task
    )
    rows = [dict(zip(columns, v, strict=True)) for v in zip(*columns.values(), strict=True)]
    return bara.predict(one.model, rows, progress=False, **options).to_records()


def close_to(records):
    """The same up to the rounding of batches of another shape."""
    return [
        {
            name: value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-5)
            for name, value in record.items()
        }
        for record in records
    ]


def ask(client, path="/v1/predict", **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# -- predictions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("reviews", [[t] for t in TEXTS]),
        ("pairs", [TEXTS[:2], TEXTS[2:]]),
        ("stars", [[t] for t in TEXTS[:2]]),
    ],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_draws": 3, "seed": 7}, {"deterministic": True}],
    ids=["defaults", "seed", "mean"],
)
def test_an_answer_is_that_of_predict(client, served, name, texts, options):
    given = {"pairs": texts} if name == "pairs" else {"texts": [text for (text,) in texts]}
    answer = ask(client, model=name, **given, **options)
    assert answer["predictions"] == close_to(expected(served[name], texts, **options))
    draws = 1 if options.get("deterministic") else options.get("num_draws", 10)
    assert answer["num_draws"] == draws
    assert answer["seed"] == options.get("seed", 0)
    assert answer["task"] == served[name].task.task


def test_an_adapter_from_elsewhere_with_its_posterior(served_folders, tmp_path, run):
    """Folders of `bara bayesianize`: a classifier's and a language model's."""
    bases = served_folders["reviews"].parent
    labelled = [{"text": text, "label": "yn"[i % 2]} for i, text in enumerate(TEXTS * 3)]
    completed = [{"prompt": words(i) + " ", "completion": words(6)} for i in range(9, 21)]
    for name, base, rows, named in (
        ("reviews", "bert", labelled, ["--labels", "n,y"]),
        ("words", "llama", completed, []),
    ):
        plain = tmp_path / f"{name}-lora"
        make_adapter(bases / base, plain, name, "lora", init_lora_weights=False)
        table = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        run("bayesianize", plain, "--data", table, "--output", tmp_path / name, *named)
    served = load_served([str(tmp_path / "reviews"), str(tmp_path / "words")])
    classifier, writer = served
    with running(create_app(served)) as url, httpx.Client(base_url=url, timeout=30) as client:
        body = {"model": "reviews", "texts": TEXTS, "num_draws": 4, "seed": 3}
        records = ask(client, **body)["predictions"]
        asked = {"prompt": words(4, 5), "max_tokens": 4, "num_draws": 3}
        (choice,) = ask(client, "/v1/completions", model="words", **asked)["choices"]
    assert records == close_to(expected(classifier, [[t] for t in TEXTS], num_draws=4, seed=3))
    assert all(record["epistemic"] > 1e-4 for record in records)
    options = {"num_draws": 3, "max_new_tokens": 4, "agreement": False}
    (answer,) = bara.generate(writer.model, writer.tokenizer, [words(4, 5)], **options)
    assert choice["text"] == answer.text
    found = choice["uncertainty"]["epistemic"]
    assert found == pytest.approx(answer.to_record()["epistemic"], rel=1e-4)
    assert found > 1e-6


def test_draws_and_seeds_make_a_difference(client):
    answers = [
        ask(client, model="reviews", texts=TEXTS[:1], num_draws=n, seed=s)["predictions"]
        for n, s in ((4, 0), (4, 1), (5, 0))
    ]
    assert answers[0] != answers[1]
    assert answers[0] != answers[2]
    assert all(p["epistemic"] > 1e-3 for (p,) in answers)


def test_requests_together_share_passes_and_answers_do_not_change(client, served, monkeypatch):
    """While a first request is computed, nine wait: those with the same draws become one pass."""
    begun, go, sizes = held_predictions(monkeypatch)

    def call(number):
        texts = TEXTS[number % 4 : number % 4 + 1 + number % 2]
        options = {"num_draws": 4, "seed": number % 3}
        return texts, options, ask(client, model="reviews", texts=texts, **options)

    with ThreadPoolExecutor(10) as pool:
        first = pool.submit(call, 0)
        assert begun.wait(20)
        others = [pool.submit(call, number) for number in range(1, 10)]
        while client.get("/metrics").text.count("bara_queue_requests 9.0") == 0:
            pass
        go.set()
        answers = [future.result(30) for future in (first, *others)]
    assert len(sizes) == 4  # the first, and one pass for each seed
    for texts, options, answer in answers:
        records = expected(served["reviews"], [[text] for text in texts], **options)
        assert answer["predictions"] == close_to(records)


def test_abstaining_under_a_calibrated_threshold(client, served):
    records = expected(served["reviews"], [[text] for text in TEXTS], num_draws=6, seed=2)
    doubts = sorted(1 - max(record["probabilities"].values()) for record in records)
    threshold = Threshold((doubts[1] + doubts[2]) / 2, 0.2, 0.1, 0.5, 100)
    save_threshold(served["reviews"].folder, threshold, num_draws=6, seed=2, measure="predictions")
    asked = {"model": "reviews", "texts": TEXTS, "num_draws": 6, "abstain_at_risk": 0.2}
    answer = ask(client, **asked, seed=2)
    declined = [1 - max(r["probabilities"].values()) > threshold.uncertainty for r in records]
    assert [p["abstained"] for p in answer["predictions"]] == declined
    assert [p["prediction"] is None for p in answer["predictions"]] == declined
    assert sum(declined) == 2
    refused(client, "calibrated with seed = 2", **asked, seed=3)
    refused(client, "no threshold for the risk 0.1", **asked | {"abstain_at_risk": 0.1}, seed=2)
    metrics = client.get("/metrics").text
    assert 'bara_abstained_total{model="reviews"} 2.0' in metrics


def test_sets_and_intervals_of_a_promised_coverage(client, served):
    """Against the quantile by its definition: the k-th smallest score, k = ceil((n + 1) 0.8)."""
    conditions = {"num_draws": 6, "seed": 2}
    records = expected(served["reviews"], [[text] for text in TEXTS], **conditions)
    middle = sorted(p for record in records for p in record["probabilities"].values())[3:5]
    sure = torch.full((12,), 0.9).double()
    sure[:3] = sum(middle) / 2  # of the label; the third largest 1 - p is the bound
    probs, labels = torch.stack([1 - sure, sure], 1), torch.ones(12).long()
    residuals = torch.linspace(-1, 2, 12).double()
    kinds = {"reviews": Conformal(probs, labels), "stars": Conformal(residuals=residuals)}
    for name, conformal in kinds.items():
        save_conformal(served[name].folder, conformal, **conditions)
    asked = {"texts": TEXTS, "coverage": 0.8, **conditions}

    largest = sorted(1 - sure)[math.ceil(13 * 0.8) - 1]
    answer = ask(client, model="reviews", **asked)["predictions"]
    for found, record in zip(answer, records, strict=True):
        inside = [name for name, p in record["probabilities"].items() if 1 - p <= largest]
        assert found["prediction_set"] == inside
    assert len({tuple(found["prediction_set"]) for found in answer}) > 1

    width = sorted(residuals.abs().tolist())[math.ceil(13 * 0.8) - 1]
    answer = ask(client, model="stars", **asked)["predictions"]
    records = expected(served["stars"], [[text] for text in TEXTS], **conditions)
    for found, record in zip(answer, records, strict=True):
        half = width * math.sqrt(record["total"])
        ends = [record["prediction"] - half, record["prediction"] + half]
        assert found["interval"] == pytest.approx(ends, rel=1e-4)

    wrong = asked | {"model": "reviews"}
    refused(client, "was made with num_draws = 6, not 5", **wrong | {"num_draws": 5})
    refused(client, "was made with seed = 2, not 3", **wrong | {"seed": 3})
    error = refused(client, "12 labelled rows cannot promise", **wrong | {"coverage": 0.99})
    assert error["param"] == "coverage"


def test_the_rank_is_that_of_effective_rank(client, served):
    one = served["reviews"]
    answer = ask(client, "/v1/rank", model="reviews", texts=TEXTS)
    columns = encode_texts([TEXTS], one.tokenizer, one.task)
    rows = [dict(zip(columns, v, strict=True)) for v in zip(*columns.values(), strict=True)]
    rank = bara.effective_rank(one.model, rows, progress=False)
    assert [layer["name"] for layer in answer["layers"]] == list(rank.layers)
    assert [layer["rank"] for layer in answer["layers"]] == pytest.approx(
        rank.per_layer.tolist(), rel=1e-4
    )
    assert answer["mean"] == pytest.approx(rank.s_bar, rel=1e-4)
    assert {layer["max_rank"] for layer in answer["layers"]} == {2}


def test_the_list_of_models(client, served):
    data = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in data] == list(served)
    assert {model["id"]: model["task"] for model in data} == {
        "reviews": "classification",
        "pairs": "classification",
        "stars": "regression",
        "words": "causal-lm",
    }
    assert client.get("/v1/models/pairs").json()["pairs"] is True
    assert client.get("/healthz").json() == {"status": "ok"}


def test_one_base_is_held_once(served):
    """Frozen weights of the base are one memory; each adapter keeps its own, and its head."""
    one, other = served["reviews"].model, served["pairs"].model
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        own = "lora_" in name or "modules_to_save" in name or "classifier" in name
        assert (theirs[name].data_ptr() == parameter.data_ptr()) == (not own), name
    assert share_parameters(one, other) == 0  # nothing is left to share


# -- what is refused -------------------------------------------------------------------------------


def refused(client, words, status=400, path="/v1/predict", **body):
    """The error of a request; it is one line, in one form, without a path of this machine."""
    return told(client.post(path, json=body), words, status)


def told(answer, words, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert "/tmp" not in answer.text
    return error


BAD = [
    ({}, "model is missing"),
    ({"model": "reviews"}, "texts is missing"),
    ({"model": "reviews", "texts": []}, "texts must be a list of 1 or more"),
    ({"model": "reviews", "texts": "good"}, "texts must be a list"),
    ({"model": "reviews", "texts": [3]}, "texts.0 must be text, not 3"),
    ({"model": "reviews", "texts": ["good", " \n"]}, "texts.1 is empty"),
    ({"model": "reviews", "texts": ["a"] * 5}, "texts: at most 4 here, not 5"),
    ({"model": "reviews", "pairs": [["a", "b"]]}, "reviews reads texts, not pairs"),
    ({"model": "pairs", "texts": ["a"]}, "pairs reads pairs, not texts"),
    ({"model": "pairs", "pairs": [["a"]]}, "pairs.0 must be"),
    ({"model": "reviews", "texts": ["a"], "num_draws": 0}, "num_draws must be at least 1"),
    ({"model": "reviews", "texts": ["a"], "num_draws": 17}, "num_draws: at most 16 here"),
    ({"model": "reviews", "texts": ["a"], "num_draws": "4"}, "num_draws must be a whole number"),
    ({"model": "reviews", "texts": ["a"], "num_draws": True}, "num_draws must be a whole number"),
    ({"model": "reviews", "texts": ["a"], "seed": -1}, "seed must be at least 0"),
    ({"model": "reviews", "texts": ["a"], "seed": 2**32}, "seed must be below"),
    ({"model": "reviews", "texts": ["a"], "draws": 4}, "draws is not supported here"),
    ({"model": "stars", "texts": ["a"], "abstain_at_risk": 0.1}, "is not for regression"),
    ({"model": "reviews", "texts": ["a"], "coverage": 1}, "coverage must be"),
    ({"model": "reviews", "texts": ["a"], "coverage": 0.9, "deterministic": True}, "needs draws"),
    ({"model": "pairs", "pairs": [["a", "b"]], "coverage": 0.9}, "pairs has no conformal calibr"),
    ({"model": "words", "texts": ["a"]}, "words is a language model"),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_predictions_are_the_client_s_fault(client, body, words):
    assert refused(client, words, **body)["type"] == "invalid_request_error"


def test_classes_in_the_form_of_vllm_are_for_classes(client):
    refused(
        client, "is for classification, not regression", 400, "/classify", model="stars", input="a"
    )
    refused(client, "pairs reads pairs, not texts", 400, "/classify", model="pairs", input="a")
    refused(client, "texts: at most 4 here", 400, "/classify", model="reviews", input=["a"] * 5)
    refused(client, "input is missing", 400, "/classify", model="reviews")


def test_an_unknown_model_is_not_found(client):
    error = refused(client, "there are reviews, pairs", 404, model="x", texts=["a"])
    assert error["type"] == "not_found_error"
    told(client.get("/v1/models/x"), "there is no model 'x'", 404)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 5000, b'{"model": ' + b"9" * 6000 + b"}"],
    ids=["empty", "broken", "list", "text", "bytes", "deep", "long number"],
)
def test_a_body_that_is_no_request(client, body):
    answer = client.post("/v1/predict", content=body, headers={"Content-Type": "application/json"})
    told(answer, "", 400)


def test_text_that_is_no_unicode(client):
    body = b'{"model": "reviews", "texts": ["\\ud800"]}'
    answer = client.post("/v1/predict", content=body, headers={"Content-Type": "application/json"})
    told(answer, "texts.0", 400)


def test_addresses_and_methods_that_there_are_not(client):
    told(client.get("/nowhere"), "no such address", 404)
    told(client.get("/v1/predict"), "does not take that method", 405)
    told(client.post("/v1/predict", content=b'{"model": "reviews"}'), "application/json", 400)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(client, chunked):
    body = json.dumps({"model": "reviews", "texts": ["a" * 30_000]}).encode()
    content = (body[i : i + 1000] for i in range(0, len(body), 1000)) if chunked else body
    answer = client.post(
        "/v1/predict", content=content, headers={"Content-Type": "application/json"}
    )
    assert told(answer, "more than 20000 bytes", 413)["type"] == "request_too_large"


@pytest.mark.parametrize("kind", [OSError, bara.BaraError])
def test_a_failing_model_is_the_server_s_fault(client, monkeypatch, caplog, kind):
    """The log says why; the client is told nothing that might name a file."""

    def broken(*args, **options):
        raise kind("models/minilm is not ../x/y, nor /home/a b/c")

    monkeypatch.setattr(prediction, "predict", broken)
    error = refused(client, "the server failed", 500, model="reviews", texts=["a"])
    assert error["message"] == "the server failed; its log says why"
    assert error["type"] == "server_error"
    assert "models/minilm is not ../x/y, nor /home/a b/c" in caplog.text


@pytest.mark.parametrize("spelling", ["my models/film", "my models/../my models/film/", "{}"])
def test_an_adapter_s_files_are_told_by_its_name(served_folders, tmp_path, monkeypatch, spelling):
    """However its folder was written, and with a name that is a part of other words."""
    folder = shutil.copytree(served_folders["reviews"], tmp_path / "my models" / "film")
    (folder / THRESHOLDS).unlink(missing_ok=True)  # another test's
    monkeypatch.chdir(tmp_path)
    asked = {"texts": ["a"], "abstain_at_risk": 0.2}
    app = create_app(load_served([f"a={spelling.format(folder)}"]))
    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        none = refused(client, "a has no threshold for the risk 0.2: make one", **asked)["message"]
        assert none.endswith("bara evaluate a --data LABELLED --calibrate-risk 0.2")
        (folder / THRESHOLDS).write_text("{")
        damaged = refused(client, f"a/{THRESHOLDS}", **asked)["message"]
    assert "models" not in none + damaged
    assert "film" not in none + damaged


def test_a_request_that_takes_too_long(served, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(
        prediction, "predict", lambda *a, **o: go.wait(20) and bara.predict(*a, **o)
    )
    monkeypatch.setattr("bara.serving.guard.GRACE", 0.0)
    app = create_app([served["reviews"]], limits=Limits(seconds=0.3))
    with running(app) as url:
        answer = httpx.post(f"{url}/v1/predict", json={"texts": ["a"]})
        assert told(answer, "not done in 0.3 seconds", 504)["type"] == "timeout_error"
        with socket.create_connection(httpx.URL(url).host and url[7:].split(":"), 5) as slow:
            slow.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            assert b" 408 " in slow.recv(1000)
        go.set()


def test_a_full_queue_and_clients_that_go(served, monkeypatch):
    begun, go, calls = held_predictions(monkeypatch)
    app = create_app([served["reviews"]], limits=Limits(queue=2))
    with running(app) as url, ThreadPoolExecutor(3) as pool:
        post = lambda seed: httpx.post(  # noqa: E731
            f"{url}/v1/predict", json={"texts": ["a"], "seed": seed}, timeout=30
        )
        first = pool.submit(post, 0)
        assert begun.wait(20)
        waiting = pool.submit(post, 1)
        with socket.create_connection(url[7:].split(":"), 5) as gone:  # asks, and does not wait
            body = b'{"texts": ["a"], "seed": 2}'
            head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            gone.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            while "bara_queue_requests 2.0" not in httpx.get(f"{url}/metrics").text:
                pass
            full = post(3)
            assert told(full, "busy", 503)["type"] == "overloaded_error"
            assert int(full.headers["Retry-After"]) >= 1
        while '"499"' not in httpx.get(f"{url}/metrics").text:
            pass
        go.set()
        assert first.result(30).status_code == waiting.result(30).status_code == 200
    assert len(calls) == 2  # nobody computed what the third client had wanted


def test_stopping_answers_what_was_asked(served, monkeypatch):
    begun, go, _ = held_predictions(monkeypatch)
    app = create_app([served["reviews"]])
    with ThreadPoolExecutor(3) as pool:
        with running(app) as url:
            ask_ = lambda seed: httpx.post(  # noqa: E731
                f"{url}/v1/predict", json={"texts": ["a"], "seed": seed}, timeout=30
            )
            answers = [pool.submit(ask_, seed) for seed in (0, 1)]
            assert begun.wait(20)
            while "bara_queue_requests 1.0" not in httpx.get(f"{url}/metrics").text:
                pass
            threading.Timer(0.2, go.set).start()  # by then the server is stopping
        assert [answer.result(30).status_code for answer in answers] == [200, 200]


# -- keys, documentation, metrics ------------------------------------------------------------------


def test_a_key_is_wanted_and_compared_whole(served):
    app = create_app([served["reviews"]], api_key=KEY)
    with running(app) as url:
        get = lambda path, **headers: httpx.get(url + path, headers=headers)  # noqa: E731
        assert get("/").status_code == get("/healthz").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            error = told(get(path), "Authorization: Bearer KEY", 401)
            assert error["type"] == "authentication_error"
        for wrong in (f"Bearer {KEY[:-1]}", f"Bearer {KEY}0", f"Basic {KEY}", KEY, "Bearer", "ü"):
            answer = get("/v1/models", Authorization=wrong.encode())
            assert told(answer, "key", 401)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert get("/v1/models", Authorization=f"Bearer {KEY}").status_code == 200


def test_keys_are_read_from_a_file_that_has_one(tmp_path):
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    assert read_key(path) == KEY
    for text in ("", "short", f"{KEY} {KEY}"):
        path.write_text(text)
        with pytest.raises(bara.BaraError, match="must hold one key"):
            read_key(path)
    with pytest.raises(bara.BaraError, match="cannot be read"):
        read_key(tmp_path / "none")


def test_the_documentation_has_examples_that_are_taken(client):
    described = client.get("/openapi.json").json()
    schemas = described["components"]["schemas"]
    for name in ("PredictRequest", "RankRequest", "ChatRequest", "CompletionRequest"):
        assert schemas[name]["examples"]
    for path in ("/v1/predict", "/v1/rank", "/v1/chat/completions", "/v1/completions"):
        answers = described["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "503", "504"} <= set(answers)
        assert answers["200"]["content"]["application/json"]["example"]
    for number, example in enumerate(schemas["PredictRequest"]["examples"]):
        model = "pairs" if "pairs" in example else "reviews"
        answer = client.post("/v1/predict", json=example | {"model": model})
        assert answer.status_code == (400 if number else 200)  # others need a calibration


def test_metrics_count_what_was_asked(client):
    def count(**labels):
        wanted = ",".join(f'{name}="{value}"' for name, value in labels.items())
        lines = client.get("/metrics").text.splitlines()
        found = [x.split()[-1] for x in lines if x.startswith(f"bara_requests_total{{{wanted}}}")]
        return float(found[0]) if found else 0.0

    labels = [{"route": "/v1/predict", "status": status} for status in (200, 400)]
    before = [count(**label) for label in labels]
    ask(client, model="reviews", texts=["good"])
    refused(client, "missing", model="reviews")
    assert [count(**label) for label in labels] == [n + 1 for n in before]


def test_no_answer_is_kept_or_guessed_at(client):
    headers = client.get("/v1/models").headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "server" not in headers or "uvicorn" in headers["server"]


# -- the command -----------------------------------------------------------------------------------


def test_the_command_serves_and_its_errors_are_one_line(
    served_folders, failing, call, monkeypatch, tmp_path
):
    ran = {}

    def run(app, listener, limits):
        ran.update(title=app.title, address=listener.getsockname(), limits=limits)

    monkeypatch.setattr("bara.serving.server.run", run)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused_ = failing("serve", served_folders["reviews"], "--port", port)
        assert f"cannot listen on 127.0.0.1:{port}" in refused_
    film = f"film={served_folders['reviews']}"
    code, _, error = call("serve", film, "--port", port, "--max-draws", 5)
    assert code == 0, error
    assert ran["address"] == ("127.0.0.1", port)
    assert ran["title"] == "bara"
    assert ran["limits"] == Limits(draws=5)
    assert f"film on http://127.0.0.1:{port}" in error
    code, _, error = call("serve", film, "--host", "0.0.0.0", "--port", port)
    assert "anybody who reaches this can ask" in error
    twice = failing("serve", film, film, "--port", port)
    assert "two adapters are called 'film'" in twice
    other = shutil.copytree(served_folders["words"], tmp_path / "other")
    described = json.loads((other / "text_task.json").read_text())
    (other / "text_task.json").write_text(json.dumps(described | {"task": "seq2seq"}))
    assert "is for seq2seq" in failing("serve", other, "--port", port)
    assert "--api-key-file" in failing("serve", tmp_path, "--api-key-file", tmp_path / "none")
    assert "no adapter folder" in failing("serve", tmp_path / "nothing", "--port", port)
    damaged = shutil.copytree(served_folders["reviews"], tmp_path / "damaged")
    (damaged / FILE).write_bytes(b"no tensors")
    assert "is damaged" in failing("serve", damaged, "--port", port)
