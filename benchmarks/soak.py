"""Mixed load on `bara serve` for half an hour, clients that vanish, a server that is killed.

    python benchmarks/soak.py

A supervisor starts the server (a MiniLM classifier and SmolLM2-135M-Instruct, both with BaRA) and
starts it again when it has ended; twice it is killed with SIGKILL. Four clients ask without pause:
predictions, completions and streams whose answers were computed before by `bara.predict` and
`bara.generate`, requests that are given up, bodies that are too large or broken. Whatever comes
back is one of: the right answer, an error with a status, a broken connection, or wrong, or lost (no
answer and no error within the client's patience, which is longer than the server's time limit).
Every minute is written to benchmarks/results/soak.jsonl at once, and the page
docs/serving-results.md at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

import bara
from bara.bench.results import append_row
from bara.data.examples import load_sentiment
from bara.data.text_task import encode_texts
from bara.language.generation import generate
from bara.machine import quieten_libraries, versions
from bara.serving.served import Served, load_served
from serving_adapters import make
from serving_page import write_page

RESULTS = Path(__file__).parent / "results/soak.jsonl"
PORT = 8765
CLIENTS = 4
PATIENCE = 45.0
"""Seconds that a client waits; the server's limit is 20, and it needs about 15 to start."""
KILLS = (2 / 15, 4 / 15)
"""When the server is killed, as parts of the whole; its last life is for the memory."""
KINDS = {"predict": 52, "complete": 14, "stream": 12, "vanish": 10, "large": 4, "broken": 8}
"""Kinds of requests and how often they come, of 100."""
CLOSE = 1e-4
"""Largest difference of a probability that is rounding: batches have other shapes."""
TIE = 1e-3
"""Log-probabilities of two tokens that are this close may change places by rounding."""
BROKEN = (b"", b"{", b"[]", b'{"texts": 3}', b'{"model": "tweets", "texts": [""]}', b"\xff" * 90)


def predictions(one: Served, texts: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """Requests for predictions, each with what `bara.predict` says."""
    cases = []
    for _ in range(60):
        chosen = rng.sample(texts, rng.randint(1, 4))
        options = {"num_draws": rng.choice((2, 4, 8)), "seed": rng.randrange(3)}
        columns = encode_texts([chosen], one.tokenizer, one.task)  # type: ignore[arg-type]
        rows = [dict(zip(columns, v, strict=True)) for v in zip(*columns.values(), strict=True)]
        records = bara.predict(one.model, rows, progress=False, **options).to_records()
        cases.append({"body": {"model": one.name, "texts": chosen, **options}, "answer": records})
    return cases


def completions(one: Served, rng: random.Random) -> list[dict[str, Any]]:
    """Requests for completions, each with what `bara.generate` says, and how close it was."""
    starts = ("The sky", "A good cook", "In the morning", "The river", "My friend", "Two plus two")
    cases = []
    for start in starts:
        for seed in range(2):
            tokens = rng.randint(3, 8)
            (answer,) = generate(
                one.model,
                one.tokenizer,
                [start],
                num_draws=2,
                seed=seed,
                max_new_tokens=tokens,
                agreement=False,
                output_logits=True,
            )
            top = answer.log_probs.topk(2).values  # type: ignore[union-attr]
            body = {"model": one.name, "prompt": start, "max_tokens": tokens}
            cases.append(
                {
                    "body": body | {"seed": seed, "num_draws": 2},
                    "answer": answer.text,
                    "margin": float((top[:, 0] - top[:, 1]).min()),
                }
            )
    return cases


class Supervisor:
    """Keeps a server running: starts it again whenever it has ended."""

    def __init__(self, folders: list[Path], log: Path) -> None:
        limits = ["--timeout", "20", "--max-queue", "16", "--max-body", "100000"]
        self.command = [sys.executable, "-m", "bara", "serve", *map(str, folders)]
        self.command += ["--port", str(PORT), *limits]
        self.log = log.open("ab")
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stderr=self.log, stdout=self.log)
        self.starts += 1

    async def watch(self) -> None:
        while True:
            if self.process.poll() is not None:
                self.start()
            await asyncio.sleep(0.2)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def memory(self) -> float:
        """MiB of the server."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return float("nan")
        sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
        return int(sizes[0]) / 1024 if sizes else float("nan")


class Load:
    """The clients, and what came of their requests."""

    def __init__(self, cases: dict[str, list[dict[str, Any]]], seed: int) -> None:
        self.cases = cases
        self.rng = random.Random(seed)
        self.url = f"http://127.0.0.1:{PORT}"
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {}
        self.largest = 0.0
        self.odd: list[str] = []

    async def client(self, end: float) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as http:
            while time.monotonic() < end:
                kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
                start = time.monotonic()
                outcome = await self.ask(http, kind)
                self.counts[f"{kind}: {outcome}"] += 1
                if outcome == "right":
                    self.seconds.setdefault(kind, []).append(time.monotonic() - start)
                if outcome in ("no connection", "busy"):
                    await asyncio.sleep(0.5)
                await asyncio.sleep(self.rng.random() * 0.1)

    async def ask(self, http: httpx.AsyncClient, kind: str) -> str:
        """Makes one request; a word for what came of it."""
        try:
            return await getattr(self, f"_{kind}")(http)
        except (httpx.ConnectError, ConnectionRefusedError):
            return "no connection"
        except httpx.TimeoutException:
            return "lost"
        except (httpx.TransportError, OSError):
            return "connection broken"

    async def _predict(self, http: httpx.AsyncClient) -> str:
        case = self.rng.choice(self.cases["predict"])
        answer = await http.post("/v1/predict", json=case["body"])
        if answer.status_code != 200:
            return self._status(answer)
        difference = max(
            abs(ours["probabilities"][name] - value)
            for ours, theirs in zip(answer.json()["predictions"], case["answer"], strict=True)
            for name, value in theirs["probabilities"].items()
        )
        self.largest = max(self.largest, difference)
        return "right" if difference <= CLOSE else self._odd(f"predict differs by {difference}")

    async def _complete(self, http: httpx.AsyncClient) -> str:
        case = self.rng.choice(self.cases["complete"])
        answer = await http.post("/v1/completions", json=case["body"])
        if answer.status_code != 200:
            return self._status(answer)
        return self._compared(case, answer.json()["choices"][0]["text"])

    async def _stream(self, http: httpx.AsyncClient) -> str:
        case = self.rng.choice(self.cases["complete"])
        text, done = "", False
        body = case["body"] | {"stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self._status(answer)
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return "error in the stream"
                    text += event["choices"][0]["text"]
        return self._compared(case, text) if done else "lost"

    def _compared(self, case: dict[str, Any], text: str) -> str:
        if text == case["answer"]:
            return "right"
        if case["margin"] < TIE:
            return "another token of the same probability"
        return self._odd(f"{text!r} is not {case['answer']!r}")

    async def _vanish(self, http: httpx.AsyncClient) -> str:
        """Asks and goes: before the body is whole, before the answer, or in the middle of it."""
        case = self.rng.choice(self.cases[self.rng.choice(("predict", "complete"))])
        stream = "prompt" in case["body"]
        path = "/v1/completions" if stream else "/v1/predict"
        body = json.dumps(case["body"] | ({"stream": True} if stream else {})).encode()
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection("127.0.0.1", PORT, limit=2**16), PATIENCE
        )
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        at = self.rng.choice((len(whole) // 2, len(whole)))
        writer.write(whole[:at])
        await writer.drain()
        if self.rng.random() < 0.5:
            await asyncio.wait({asyncio.ensure_future(reader.read(100))}, timeout=self.rng.random())
        writer.transport.abort()
        return "gone"

    async def _large(self, http: httpx.AsyncClient) -> str:
        body = b'{"model": "tweets", "texts": ["' + b"a" * 200_000 + b'"]}'
        answer = await http.post(
            "/v1/predict", content=body, headers={"Content-Type": "application/json"}
        )
        return "refused" if answer.status_code == 413 else self._status(answer)

    async def _broken(self, http: httpx.AsyncClient) -> str:
        path = self.rng.choice(("/v1/predict", "/v1/completions", "/v1/chat/completions"))
        answer = await http.post(
            path, content=self.rng.choice(BROKEN), headers={"Content-Type": "application/json"}
        )
        return "refused" if answer.status_code == 400 else self._status(answer)

    def _status(self, answer: httpx.Response) -> str:
        if answer.status_code == 503 and answer.headers.get("Retry-After"):
            return "busy"
        if answer.status_code == 504:
            return "late"
        return self._odd(f"status {answer.status_code}: {answer.text[:200]}")

    def _odd(self, what: str) -> str:
        self.odd.append(what)
        return "wrong"

    def minute(self) -> dict[str, Any]:
        """What has come since the last time."""
        times = {
            kind: {"p50": median(values), "p99": quantiles(values, n=100)[98]}
            for kind, values in self.seconds.items()
            if len(values) > 1
        }
        row = {"counts": dict(self.counts), "seconds": times, "largest difference": self.largest}
        row["odd"] = self.odd[:20]
        self.counts, self.seconds, self.odd = Counter(), {}, []
        return row


async def soak(minutes: float, supervisor: Supervisor, load: Load, output: Path) -> None:
    """Runs the load, kills the server, writes a row a minute."""
    watching = asyncio.create_task(supervisor.watch())
    async with httpx.AsyncClient(base_url=load.url) as http:
        while True:
            try:
                await http.get("/healthz")
                break
            except httpx.TransportError:
                await asyncio.sleep(0.5)
    start = time.monotonic()
    end = start + 60 * minutes
    clients = [asyncio.create_task(load.client(end)) for _ in range(CLIENTS)]
    about = {"clients": CLIENTS, "versions": versions()}
    kills = [start + part * 60 * minutes for part in KILLS]
    last, memory = time.monotonic(), list[float]()
    while (now := time.monotonic()) < end:
        if kills and now > kills[0]:
            kills.pop(0)
            supervisor.kill()
        memory.append(supervisor.memory())
        if now - last >= 60 or end - now < 5:
            row = {"minute": (now - start) / 60, "life": supervisor.starts, "memory_mib": memory}
            append_row(output, row | load.minute() | about)
            last, memory = now, []
            if end - now < 5:
                break
        await asyncio.sleep(5)
    await asyncio.gather(*clients)
    row = {"minute": minutes, "life": supervisor.starts, "memory_mib": [supervisor.memory()]}
    append_row(output, row | load.minute() | about)
    watching.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--adapters", type=Path, help="where the adapters are, or are made")
    arguments = parser.parse_args()
    quieten_libraries()
    arguments.output.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.adapters or Path(temporary)
        folders = [make(root / "tweets", "minilm", "bara"), make(root / "texts", "smollm2", "bara")]
        served = load_served([str(folder) for folder in folders])
        rng = random.Random(0)
        texts = list(load_sentiment(300, 100, 1).test["text"])
        cases = {
            "predict": predictions(served[0], texts, rng),
            "complete": completions(served[1], rng),
        }
        del served
        supervisor = Supervisor(folders, Path(temporary) / "log")
        try:
            asyncio.run(soak(arguments.minutes, supervisor, Load(cases, 0), arguments.output))
        finally:
            supervisor.process.send_signal(signal.SIGTERM)
            code = supervisor.process.wait()
            log = (Path(temporary) / "log").read_text("utf-8", "replace")
    append_row(
        arguments.output, {"exit": code, "log_lines": len(log.splitlines()), "log": log[-3000:]}
    )
    if arguments.output == RESULTS:
        write_page()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
