"""Averages the answers of a Bayesian ensemble that a multi-LoRA server holds.

`bara export --mode draws` writes this file beside the adapters it makes. It needs Python 3.11 and
nothing else. Start a server with an OpenAI-compatible completions interface on the base model and
give it every adapter under its name in `manifest.json`, then

    python client.py "The film was great. Sentiment:" --choices " good" " bad"

or, in Python,

    Ensemble.from_folder("my-export").ask("...", choices=[" good", " bad"])
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

URL = "http://localhost:8000/v1"


@dataclass(frozen=True)
class Answer:
    """The ensemble's distribution of the next token.

    Attributes:
        probabilities: mean over draws; by choice, or by token where no choices were given.
        rest: mean probability of everything else, which the server did not list or was no choice.
        total: entropy of the mean, in nats.
        aleatoric: mean over draws of the entropy.
        epistemic: total - aleatoric, what the draws disagree about; never negative.

    With choices, probabilities are renormalised over them in every draw, and the uncertainties are
    about them. Without, what the server does not list counts as one more token.
    """

    probabilities: dict[str, float]
    rest: float
    total: float
    aleatoric: float
    epistemic: float


class EnsembleError(RuntimeError):
    """The server could not be reached, or did not answer what the interface promises."""


@dataclass(frozen=True)
class Ensemble:
    """The adapters of one export on one server.

    Attributes:
        adapters: their names on the server.
        url: of the interface, up to and with `/v1`.
        api_key: sent as a bearer token; None for none.
        timeout: of one request, in seconds.
    """

    adapters: tuple[str, ...]
    url: str = URL
    api_key: str | None = None
    timeout: float = 60.0

    @classmethod
    def from_folder(cls, folder: str | Path, **options: Any) -> Ensemble:
        """The ensemble whose names `manifest.json` lists."""
        manifest = json.loads((Path(folder) / "manifest.json").read_text("utf-8"))
        return cls(tuple(manifest["adapters"]), **options)

    def ask(self, prompt: str, choices: Sequence[str] = (), top: int = 20) -> Answer:
        """The next token after the prompt, averaged over the draws, which are asked in parallel.

        Args:
            prompt: what the model is to continue.
            choices: restricts the answer to these tokens, each in the server's spelling.
            top: tokens the server is asked to list; vLLM allows 20.

        Raises:
            EnsembleError: no answer, or none of the choices is in a draw's list.
        """
        with ThreadPoolExecutor(max_workers=min(16, len(self.adapters))) as pool:
            draws = list(pool.map(lambda name: self._next_token(name, prompt, top), self.adapters))
        return average(draws, choices)

    def _next_token(self, adapter: str, prompt: str, top: int) -> dict[str, float]:
        """Probabilities of the tokens that one adapter lists."""
        body = {"model": adapter, "prompt": prompt, "max_tokens": 1, "logprobs": top}
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        address = f"{self.url.rstrip('/')}/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.load(response)
            listed = answer["choices"][0]["logprobs"]["top_logprobs"][0]
            return {token: math.exp(value) for token, value in listed.items()}
        except urllib.error.HTTPError as error:
            reason = error.read().decode("utf-8", "replace").strip()[:200]
            raise EnsembleError(f"{address}, {adapter}: {error.code} {reason}") from error
        except OSError as error:
            raise EnsembleError(f"{address} cannot be reached: {error}") from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise EnsembleError(f"{address}, {adapter}: no top_logprobs in the answer") from error


def average(draws: Sequence[dict[str, float]], choices: Sequence[str] = ()) -> Answer:
    """The mixture of the draws' distributions, and what they disagree about.

    Raises:
        EnsembleError: none of the choices is in a draw's list.
    """
    rest = sum(1 - sum(p for t, p in d.items() if not choices or t in choices) for d in draws)
    tokens = list(choices) or list(dict.fromkeys(token for draw in draws for token in draw))
    rows = []
    for draw in draws:
        row = [draw.get(token, 0.0) for token in tokens]
        if choices:
            mass = sum(row)
            if mass == 0:
                raise EnsembleError(f"none of the choices {list(choices)} is among {list(draw)}")
            row = [p / mass for p in row]
        else:
            row.append(max(0.0, 1 - sum(row)))
        rows.append(row)
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    total = _entropy(mean)
    aleatoric = sum(_entropy(row) for row in rows) / len(rows)
    return Answer(
        probabilities=dict(zip(tokens, mean, strict=False)),
        rest=max(0.0, rest / len(draws)),
        total=total,
        aleatoric=aleatoric,
        epistemic=max(0.0, total - aleatoric),
    )


def _entropy(probabilities: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ask a Bayesian ensemble for the next token.")
    parser.add_argument("prompt")
    parser.add_argument("--choices", nargs="*", default=[], help="restrict the answer to these")
    parser.add_argument("--url", default=URL)
    parser.add_argument("--api-key")
    given = parser.parse_args(arguments)
    folder = Path(__file__).parent
    ensemble = Ensemble.from_folder(folder, url=given.url, api_key=given.api_key)
    try:
        answer = ensemble.ask(given.prompt, given.choices)
    except EnsembleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(answer), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
