"""The ensemble's client against a server that answers as an OpenAI-compatible one does."""

import json
import math
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from bara.export.client import Ensemble, EnsembleError, average, main

TABLE = {
    "draw-0": {" good": 0.6, " bad": 0.3, " the": 0.1},
    "draw-1": {" good": 0.2, " bad": 0.5, " a": 0.2},
}


class Server(BaseHTTPRequestHandler):
    seen: ClassVar[list[dict]] = []
    keys: ClassVar[list[str | None]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({**body, "path": self.path})
        self.keys.append(self.headers.get("Authorization"))
        table = TABLE.get(body["model"])
        if body["prompt"] == "odd":
            answer = {"choices": [{"text": "!"}]}
        else:
            logs = {token: math.log(p) for token, p in (table or {}).items()}
            answer = {"choices": [{"text": "", "logprobs": {"top_logprobs": [logs]}}]}
        self.send_response(200 if table else 404)
        self.end_headers()
        self.wfile.write(json.dumps(answer if table else {"message": "no such model"}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    Server.seen.clear()
    Server.keys.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def entropy(*probabilities):
    return -sum(p * math.log(p) for p in probabilities)


def test_probabilities_are_averaged_over_the_draws(url):
    answer = Ensemble(tuple(TABLE), url, api_key="secret").ask("The film was")
    # " the" and " a" are listed by one draw each: nobody knows what the other makes of them
    assert answer.probabilities == pytest.approx({" good": 0.4, " bad": 0.4})
    assert answer.rest == pytest.approx(0.2)
    assert answer.total == pytest.approx(entropy(0.4, 0.4, 0.2))
    aleatoric = (entropy(0.6, 0.3, 0.1) + entropy(0.2, 0.5, 0.3)) / 2
    assert answer.aleatoric == pytest.approx(aleatoric)
    assert answer.epistemic == pytest.approx(answer.total - aleatoric)
    assert sorted(request["model"] for request in Server.seen) == ["draw-0", "draw-1"]
    assert {request["path"] for request in Server.seen} == {"/v1/completions"}
    assert all(request["max_tokens"] == 1 and request["logprobs"] == 20 for request in Server.seen)
    assert set(Server.keys) == {"Bearer secret"}


def test_choices(url):
    answer = Ensemble(tuple(TABLE), url).ask("The film was", [" good", " bad"])
    assert answer.probabilities == pytest.approx(
        {" good": (2 / 3 + 2 / 7) / 2, " bad": (1 / 3 + 5 / 7) / 2}
    )
    assert answer.rest == pytest.approx((0.1 + 0.3) / 2)


def test_from_a_folder_and_on_the_command_line(url, tmp_path, capsys, monkeypatch):
    (tmp_path / "manifest.json").write_text(json.dumps({"adapters": list(TABLE)}))
    assert Ensemble.from_folder(tmp_path, url=url).adapters == ("draw-0", "draw-1")
    named = Ensemble.from_folder(tmp_path, prefix="base:")
    assert named.adapters == ("base:draw-0", "base:draw-1")
    monkeypatch.setattr("bara.export.client.__file__", str(tmp_path / "client.py"))
    assert main(["The film was", "--url", url, "--choices", " good", " bad"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown["probabilities"]) == {" good", " bad"}
    assert main(["odd", "--url", url]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_errors(url):
    with pytest.raises(EnsembleError, match=r"draw-9: 404 .*no such model"):
        Ensemble(("draw-9",), url).ask("x")
    with pytest.raises(EnsembleError, match="no top_logprobs"):
        Ensemble(("draw-0",), url).ask("odd")
    with pytest.raises(EnsembleError, match="none of the choices"):
        Ensemble(tuple(TABLE), url).ask("x", [" unheard"])
    with pytest.raises(EnsembleError, match="cannot be reached"):
        Ensemble(("draw-0",), "http://127.0.0.1:1/v1").ask("x")


def test_agreeing_draws_leave_no_epistemic_uncertainty():
    assert average([{"a": 0.5, "b": 0.5}] * 3).epistemic == pytest.approx(0)
    sure = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}]
    assert average(sure).epistemic == pytest.approx(math.log(2))


def test_lists_of_unequal_tokens_are_no_disagreement():
    """Two draws with one distribution, 1/2, 1/4 and 1/4, and a server that lists two tokens."""
    answer = average([{"a": 0.5, "b": 0.25}, {"a": 0.5, "c": 0.25}])
    assert answer.epistemic == pytest.approx(0)
    assert (answer.probabilities, answer.rest) == ({"a": 0.5}, pytest.approx(0.5))


def test_what_draws_disagree_about_is_never_more_than_over_all_tokens():
    generator = random.Random(0)
    for _ in range(50):
        draws = []
        for _ in range(3):
            weights = [generator.expovariate(1) ** 3 for _ in range(8)]
            draws.append({str(i): w / sum(weights) for i, w in enumerate(weights)})
        listed = [dict(sorted(d.items(), key=lambda pair: -pair[1])[:4]) for d in draws]
        assert average(listed).epistemic <= average(draws).epistemic + 1e-12
