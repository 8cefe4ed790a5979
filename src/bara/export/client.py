"""Averages the answers of a Bayesian ensemble that a multi-LoRA server holds.

`bara export --mode draws` writes this file beside the adapters it makes. It needs Python 3.11 and
nothing else. Start a server with vLLM's interface (vLLM itself, or another that speaks it) on the
base model, give it every adapter under its name in `manifest.json` (`--load` does), then

    python client.py "The film was great. Sentiment:" --choices " good" " bad"
    python client.py "Why is the sky blue?" --answers " It scatters blue light." " It is painted."
    python client.py "a text" --classify

or, in Python,

    ensemble = Ensemble.from_folder("my-export")
    ensemble.ask("...", choices=[" good", " bad"])
    ensemble.score("...", answers=[" several words", " others"])
    ensemble.classify("...")
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

URL = "http://localhost:8000/v1"
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """The ensemble's distribution of the next token, of whole answers, or of a text's class.

    Attributes:
        probabilities: mean over draws; by choice, answer or class, or by token where no choices
            were given.
        rest: mean probability of everything else, which the server did not list or was no choice.
        total: entropy of the mean, in nats.
        aleatoric: mean over draws of the entropy.
        epistemic: total - aleatoric, what the draws disagree about; never negative.
        log_likelihoods: of whole answers: log of the mean over draws of the probability of all
            their tokens, in nats; empty for anything else.

    With choices, probabilities are renormalised over them in every draw, and the uncertainties are
    about them; a choice that a draw does not list counts as 0 there (`Ensemble.score` reads all).
    Without, what is not listed for every draw counts as one more token, so that the uncertainties
    are lower bounds of those over all tokens.
    """

    probabilities: dict[str, float]
    rest: float
    total: float
    aleatoric: float
    epistemic: float
    log_likelihoods: dict[str, float] = field(default_factory=dict)


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
        label_names: of a classifier, in the order of its outputs; () names them 0, 1, ....
        temperature: that the adapter's scores of whole answers are divided by.
    """

    adapters: tuple[str, ...]
    url: str = URL
    api_key: str | None = None
    timeout: float = 60.0
    label_names: tuple[str, ...] = ()
    temperature: float = 1.0

    @classmethod
    def from_folder(cls, folder: str | Path, *, prefix: str = "", **options: Any) -> Ensemble:
        """The ensemble whose names `manifest.json` lists.

        Args:
            folder: of the export.
            prefix: what the server puts before them; Ray Serve the base model's name and ":".
            options: fields of the ensemble.
        """
        manifest = json.loads((Path(folder) / "manifest.json").read_text("utf-8"))
        names = tuple(manifest.get("label_names") or ())
        adapters = tuple(prefix + name for name in manifest["adapters"])
        known = {"label_names": names, "temperature": manifest.get("temperature", 1.0)}
        return cls(adapters, **{**known, **options})

    def load(self, folder: str | Path) -> None:
        """Loads the draws of an export into the running server.

        vLLM takes them if it was started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and
        `--enable-lora --max-loras N --max-lora-rank R`, `bara serve` with `--load-from FOLDER`,
        in which they are, and a key. The folder is read by the server: it has to be there under
        the same path.

        Raises:
            EnsembleError: the server refuses one, or already has one of that name.
        """
        for name in self.adapters:
            path = str((Path(folder) / name).resolve())
            self._post("load_lora_adapter", {"lora_name": name, "lora_path": path}, name)

    def ask(self, prompt: str, choices: Sequence[str] = (), top: int = 20) -> Answer:
        """The next token after the prompt, averaged over the draws, which are asked in parallel.

        Args:
            prompt: what the model is to continue.
            choices: restricts the answer to these tokens, each in the server's spelling.
            top: tokens the server is asked to list; vLLM allows 20.

        Raises:
            EnsembleError: no answer, or none of the choices is in a draw's list.
        """
        return average(self._each(lambda name: self._next_token(name, prompt, top)), choices)

    def score(self, prompt: str, answers: Sequence[str]) -> Answer:
        """Whole answers, read by every draw and not generated (vLLM's `prompt_logprobs`).

        In each draw the probabilities are the softmax over the answers of the mean log-probability
        of their tokens over the temperature, as in `bara.multiple_choice`.

        Args:
            prompt: what comes before.
            answers: texts to come after it, each as it would follow, with its first space.

        Raises:
            EnsembleError: no answer, or an answer whose first token reaches into the prompt.
        """
        start = self._prompt_tokens(self.adapters[0], prompt)

        def read(name: str) -> list[list[float]]:
            found = []
            for answer in answers:
                tokens = self._prompt_tokens(name, prompt + answer)
                before, after = tokens[: len(start)], tokens[len(start) :]
                if [t for t, _ in before] != [t for t, _ in start] or not after:
                    raise EnsembleError(
                        f"the tokens of {answer!r} do not begin where the prompt ends; move the "
                        "space between them from the prompt to the answer"
                    )
                found.append([log_prob for _, log_prob in after])
            return found

        draws = self._each(read)
        scores = [[sum(logs) / len(logs) / self.temperature for logs in draw] for draw in draws]
        rows = [dict(zip(answers, _softmax(row), strict=True)) for row in scores]
        whole = {
            answer: _log_mean_exp([sum(draw[i]) for draw in draws])
            for i, answer in enumerate(answers)
        }
        return replace(average(rows, answers), log_likelihoods=whole)

    def classify(self, text: str) -> Answer:
        """The class of a text, from vLLM's `/classify` (a sequence classifier's adapters).

        Raises:
            EnsembleError: no answer.
        """
        return average(self._each(lambda name: self._classes(name, text)))

    def _each(self, ask: Callable[[str], T]) -> list[T]:
        """What every draw answers, asked in parallel."""
        with ThreadPoolExecutor(max_workers=min(16, len(self.adapters))) as pool:
            return list(pool.map(ask, self.adapters))

    def _classes(self, adapter: str, text: str) -> dict[str, float]:
        body = {"model": adapter, "input": text}
        answer = self._post("classify", body, adapter, version="")
        names = self.label_names
        try:
            probs = answer["data"][0]["probs"]
            return {names[i] if names else str(i): float(p) for i, p in enumerate(probs)}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EnsembleError(f"{adapter}: no class probabilities in the answer") from error

    def _next_token(self, adapter: str, prompt: str, top: int) -> dict[str, float]:
        """Probabilities of the tokens that one adapter lists."""
        body = {"model": adapter, "prompt": prompt, "max_tokens": 1, "logprobs": top}
        answer = self._post("completions", body, adapter)
        try:
            listed = answer["choices"][0]["logprobs"]["top_logprobs"][0]
            return {token: math.exp(value) for token, value in listed.items()}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise EnsembleError(f"{adapter}: no top_logprobs in the answer") from error

    def _prompt_tokens(self, adapter: str, prompt: str) -> list[tuple[str, float]]:
        """Id and log-probability of each token of a text; the first one's is 0."""
        body = {"model": adapter, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0}
        answer = self._post("completions", body, adapter)
        try:
            # with 0 alternatives each position has the token itself, and the first one nothing
            _, *positions = answer["choices"][0]["prompt_logprobs"]
            tokens = [next(iter(position.items())) for position in positions]
            return [("", 0.0), *((name, float(found["logprob"])) for name, found in tokens)]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EnsembleError(f"{adapter}: no prompt_logprobs in the answer") from error

    def _post(self, route: str, body: dict[str, Any], adapter: str, version: str = "/v1") -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        address = f"{self.url.rstrip('/').removesuffix('/v1')}{version}/{route}"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = response.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            reason = error.read().decode("utf-8", "replace").strip()[:200]
            raise EnsembleError(f"{address}, {adapter}: {error.code} {reason}") from error
        except (OSError, ValueError) as error:
            raise EnsembleError(f"{address} cannot be reached: {error}") from error
        try:
            return json.loads(content)
        except ValueError:
            return content  # vLLM says in words that it has loaded an adapter


def average(draws: Sequence[dict[str, float]], choices: Sequence[str] = ()) -> Answer:
    """The mixture of the draws' distributions, and what they disagree about.

    Raises:
        EnsembleError: none of the choices is in a draw's list.
    """
    # the same events in all draws, or they would seem to disagree about what one does not list
    tokens = list(choices) or [t for t in draws[0] if all(t in draw for draw in draws)]
    rest = sum(1 - sum(draw.get(token, 0.0) for token in set(tokens)) for draw in draws)
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


def _softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    parts = [math.exp(value - top) for value in values]
    return [part / sum(parts) for part in parts]


def _log_mean_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values) / len(values))


def _entropy(probabilities: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of this file; its exit status."""
    parser = argparse.ArgumentParser(description="Ask a Bayesian ensemble.")
    parser.add_argument("prompt", nargs="?", help="a prompt, or a text to classify")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--choices", nargs="*", default=[], help="tokens to choose the next from")
    what.add_argument("--answers", nargs="+", help="whole answers to score")
    what.add_argument("--classify", action="store_true", help="the text's class")
    what.add_argument("--load", action="store_true", help="load the draws into the server")
    parser.add_argument("--url", default=URL)
    parser.add_argument("--api-key")
    parser.add_argument("--prefix", default="", help="before the adapters' names on the server")
    given = parser.parse_args(arguments)
    if (given.prompt is None) != given.load:
        parser.error("give a prompt, or --load without one")
    folder = Path(__file__).parent
    options = {"url": given.url, "api_key": given.api_key, "prefix": given.prefix}
    ensemble = Ensemble.from_folder(folder, **options)
    try:
        if given.load:
            ensemble.load(folder)
            print(f"loaded {len(ensemble.adapters)} draws into {given.url}")
            return 0
        if given.classify:
            answer = ensemble.classify(given.prompt)
        elif given.answers:
            answer = ensemble.score(given.prompt, given.answers)
        else:
            answer = ensemble.ask(given.prompt, given.choices)
    except EnsembleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(answer), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
