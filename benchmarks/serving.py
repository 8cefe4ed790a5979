"""Throughput and latency of `bara serve` at 1, 8 and 64 clients, on two cores.

    OMP_NUM_THREADS=2 python benchmarks/serving.py

Against a loop of single calls (`bara.predict`, `bara.generate`) in order of arrival, and
against plain transformers that serves a LoRA adapter: a FastAPI app around `pipeline` for MiniLM
and around `generate` for SmolLM2-135M-Instruct, one request at a time. BaRA has 10 draws for a text
and 4 for an answer of 16 tokens; LoRA has none, and is also served by `bara serve`. Every client
asks again when it has its answer. Every finished cell is written to
benchmarks/results/serving.jsonl at once, a second run goes on where the first stopped; the tables
go to docs/serving-results.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx

import bara
from bara.bench.results import append_row, read_lines
from bara.data.examples import load_sentiment
from bara.data.text_task import encode_texts
from bara.machine import quieten_libraries, versions
from serving_adapters import make
from serving_page import write_page

RESULTS = Path(__file__).parent / "results/serving.jsonl"
PORT = 8767
CLIENTS = (1, 8, 64)
DRAWS = {"minilm": 10, "smollm2": 4}
NEW_TOKENS = 16
SECONDS = {"minilm": 10.0, "smollm2": 24.0}
"""How long clients ask anew; what they have asked by then is waited for."""
PROMPTS = ("The sky", "A good cook", "In the morning", "The river", "My friend", "Two plus two")
SYSTEMS = ("bara serve", "loop of single calls", "bara serve, LoRA", "transformers, LoRA")


def body_of(model: str, number: int, texts: list[str]) -> dict[str, Any]:
    """The request with this number."""
    if model == "minilm":
        return {"texts": [texts[number % len(texts)]], "num_draws": DRAWS[model]}
    prompt = f"{PROMPTS[number % len(PROMPTS)]} {number % 97}"
    return {"prompt": prompt, "max_tokens": NEW_TOKENS, "num_draws": DRAWS[model]}


Taken = tuple[list[float], float]
"""Seconds of every request, and of all together."""


async def over_http(model: str, clients: int, texts: list[str]) -> Taken:
    """What the clients measure."""
    path = "/v1/predict" if model == "minilm" else "/v1/completions"
    limits = httpx.Limits(max_connections=clients)
    url = f"http://127.0.0.1:{PORT}"
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def request(number: int) -> float:
            start = time.perf_counter()
            answer = await http.post(path, json=body_of(model, number, texts))
            answer.raise_for_status()
            return time.perf_counter() - start

        async def client(first: int, end: float) -> list[float]:
            taken, number = [], first
            while not taken or time.perf_counter() < end:
                taken.append(await request(number))
                number += clients
            return taken

        await asyncio.gather(*(request(number) for number in range(min(clients, 8))))  # warm-up
        start = time.perf_counter()
        end = start + SECONDS[model]
        parts = await asyncio.gather(*(client(i, end) for i in range(clients)))
        return [seconds for part in parts for seconds in part], time.perf_counter() - start


def in_a_loop(call: Callable[[int], Any], model: str, clients: int) -> Taken:
    """The same with one thread that calls, for clients in the order in which they came."""
    caller = ThreadPoolExecutor(1)

    def client(first: int) -> list[float]:
        taken, number = [], first
        while not taken or time.perf_counter() < end:
            start = time.perf_counter()
            caller.submit(call, number).result()
            taken.append(time.perf_counter() - start)
            number += clients
        return taken

    caller.submit(call, 0).result()  # warm-up
    begun = time.perf_counter()
    end = begun + SECONDS[model]
    with caller, ThreadPoolExecutor(clients) as pool:
        taken = [seconds for part in pool.map(client, range(clients)) for seconds in part]
    return taken, time.perf_counter() - begun


def single_calls(folder: Path, model: str, texts: list[str]) -> Callable[[int], Any]:
    """What the loop calls."""
    loaded, tokenizer, task = bara.load_adapter(folder)

    def predict(number: int) -> Any:
        body = body_of(model, number, texts)
        columns = encode_texts([body["texts"]], tokenizer, task)  # type: ignore[arg-type]
        row = {name: values[0] for name, values in columns.items()}
        return bara.predict(loaded, [row], num_draws=body["num_draws"], progress=False).to_records()

    def generate(number: int) -> Any:
        body = body_of(model, number, texts)
        options = {"num_draws": body["num_draws"], "max_new_tokens": NEW_TOKENS}
        (answer,) = bara.generate(loaded, tokenizer, [body["prompt"]], agreement=False, **options)
        return answer.to_record()

    return predict if model == "minilm" else generate


def plain_app(folder: Path, model: str) -> Any:
    """Plain transformers and PEFT behind FastAPI: a pass for each request."""
    from fastapi import FastAPI
    from transformers import pipeline

    loaded, tokenizer, _ = bara.load_adapter(folder)
    app, caller = FastAPI(), ThreadPoolExecutor(1)  # one pass at a time, in order of arrival
    classify = None
    if model == "minilm":
        classify = pipeline("text-classification", model=loaded, tokenizer=tokenizer, top_k=None)

    @app.get("/healthz")
    def health() -> dict[str, str]:
        return {}

    @app.post("/v1/predict")
    def predict(body: dict[str, Any]) -> Any:
        assert classify is not None
        return caller.submit(classify, body["texts"]).result()

    @app.post("/v1/completions")
    def complete(body: dict[str, Any]) -> Any:
        return caller.submit(generate, body["prompt"], body["max_tokens"]).result()

    def generate(prompt: str, max_tokens: int) -> Any:
        inputs = tokenizer([prompt], return_tensors="pt")
        pad = tokenizer.pad_token_id
        tokens = loaded.generate(**inputs, max_new_tokens=max_tokens, pad_token_id=pad)
        return {"text": tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])}

    return app


@cache
def dtype_of(folder: Path) -> str:
    """What the model computes in: nothing here autocasts."""
    return str(bara.load_adapter(folder)[0].dtype).removeprefix("torch.")


def measure(system: str, model: str, folder: Path, clients: int, texts: list[str]) -> Taken:
    """What clients of one system measure."""
    if system.startswith("loop"):
        return in_a_loop(single_calls(folder, model, texts), model, clients)
    if system.startswith("bara"):
        command = ["-m", "bara", "serve", str(folder), "--port", str(PORT), "--timeout", "600"]
        command += ["--batch-size", "256" if model == "minilm" else "64"]
    else:
        command = [__file__, "--plain", str(folder), "--models", model]
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{PORT}/healthz")
                break
            except httpx.TransportError:
                if process.poll() is not None:
                    raise SystemExit(f"{system} has ended") from None
                time.sleep(0.2)
        return asyncio.run(over_http(model, clients, texts))
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(DRAWS), choices=list(DRAWS))
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--adapters", type=Path, help="where the adapters are, or are made")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quieten_libraries()
    if arguments.plain is not None:
        import uvicorn

        app = plain_app(arguments.plain, arguments.models[0])
        uvicorn.run(app, port=PORT, log_level="warning")
        return
    texts = list(load_sentiment(300, 100, 1).test["text"])
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.adapters or Path(temporary)
        for model in arguments.models:
            for system in arguments.systems:
                method = "lora" if "LoRA" in system else "bara"
                name = {"minilm": "tweets", "smollm2": "texts"}[model]
                folder = make(root / (name if method == "bara" else f"{name}-lora"), model, method)
                for clients in arguments.clients:
                    key = {"model": model, "system": system, "clients": clients}
                    if any(key.items() <= row.items() for row in read_lines(arguments.output)):
                        continue
                    taken, wall = measure(system, model, folder, clients, texts)
                    row = key | {"seconds": taken, "wall": wall, "load": os.getloadavg()[0]}
                    row["dtype"] = dtype_of(folder)
                    # but for the precision, which is what a training would take here
                    known = {n: v for n, v in versions().items() if n != "precision"}
                    append_row(arguments.output, row | {"versions": known})
                    p99 = quantiles(taken, n=100)[98] if len(taken) > 1 else taken[0]
                    print(f"{model} {system} {clients}: {len(taken)}, p99 {p99:.2f}", flush=True)
    if arguments.output == RESULTS:
        write_page()


if __name__ == "__main__":
    main()
