"""Decoding 8 draws together against single decodes of the same length, in one run.

    OMP_NUM_THREADS=2 python benchmarks/decoding_speed.py

SmolLM2-135M-Instruct with a BaRA adapter on its attention. Single decodes (the posterior mean,
`deterministic=True`) and mixtures of draws take turns; the ratio of their median times is written
to benchmarks/results/decoding_speed.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from peft import get_peft_model

import bara
from bara.files import atomic_write_text
from bara.finetuning.finetune import attention_projections
from bara.machine import quieten_libraries, versions
from bara.models.base import load_causal_lm, load_tokenizer
from bara.models.gguf import smollm2_path

RESULTS = Path(__file__).parent / "results/decoding_speed.json"
PROMPT = [{"role": "user", "content": "Explain in a few sentences why the sky is blue."}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-draws", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quieten_libraries()
    torch.manual_seed(0)
    base = load_causal_lm(str(smollm2_path()), {"dtype": "float32"})
    tokenizer = load_tokenizer(str(smollm2_path()), base)
    config = bara.BaraConfig(r=8, target_modules=attention_projections(base), task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval().to(arguments.device)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start; the time does not depend on the values
            torch.nn.init.normal_(parameter, std=0.02)
    ways = {
        "single": {"deterministic": True},
        "mixture": {"num_draws": arguments.num_draws, "agreement": False},
        "mixture and every draw's own answer": {"num_draws": arguments.num_draws},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    length = {"max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens}
    bara.generate(model, tokenizer, [PROMPT], deterministic=True, max_new_tokens=2)  # warm-up
    for _ in range(arguments.repeats):
        for name, options in ways.items():
            start = time.perf_counter()
            bara.generate(model, tokenizer, [PROMPT], **length, **options)
            seconds[name].append(time.perf_counter() - start)
    single = median(seconds["single"])
    result = {
        "new_tokens": arguments.new_tokens,
        "num_draws": arguments.num_draws,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "ratio to a single decode": {n: median(t) / single for n, t in seconds.items()},
        "versions": versions() | {"precision": "float32"},
    }
    atomic_write_text(arguments.results, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["ratio to a single decode"], indent=2))


if __name__ == "__main__":
    main()
