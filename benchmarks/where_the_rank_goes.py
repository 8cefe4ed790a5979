"""Where BaRA's rank goes, whether it travels, and whether more data pays for rank per input.

    python benchmarks/where_the_rank_goes.py --data FOLDER
    python benchmarks/where_the_rank_goes.py --analyse

FOLDER has `tweet_eval_emotion`, `tweet_eval_irony` and `banking77` as `bara bench --data` reads
them; the other tasks come with packages. Every finished run is appended to
benchmarks/results/where_the_rank_goes.jsonl at once; a second run goes on where the first stopped.
The analysis writes the tables and the pictures of docs/where-the-rank-goes.md.

Asked before the runs, each with the number that answers it:

1. Does the rank's profile over layers follow the task? If the correlation of two profiles over the
   18 layers is lower between tasks than between seeds of one task.
2. Does the rank answer to another domain? If the AUROC of an input's rank, own texts against those
   of another task, is above 0.6 in the mean.
3. Does a pruned BaRA travel better than a LoRA of its size? If its mean NLL on another domain's
   texts, with the same meaning of the classes and no training there, is lower by more than the
   paired standard error over seeds and directions.
4. With how many texts do gates that read the input pay? With as many as bring the NLL with them
   below the NLL without by 1%; the rank's spread over inputs is beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure

import bara
from bara.bench.results import append_row, read_lines
from bara.bench.tasks import load_task
from bara.evaluation.metrics import classification_metrics
from bara.machine import fast_bfloat16, quieten_libraries, versions
from bara.ranks.effective_rank import EffectiveRank, effective_rank, rank_shift
from pages import write_between
from small_texts import trained

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/where_the_rank_goes.jsonl"
PAGE = ROOT / "docs/where-the-rank-goes.md"
PICTURE = ROOT / "docs/images/where-the-rank-goes.png"
MARK = "where the rank goes"

SENTIMENT, EMOTION = "tweet-sentiment", "tweet_eval_emotion"
PROFILES = (SENTIMENT, EMOTION, "tweet_eval_irony", "bbc-news")
POSITIVE = {SENTIMENT: ("positive",), EMOTION: ("joy", "optimism")}
NEGATIVE = {SENTIMENT: ("negative",), EMOTION: ("anger", "sadness")}
"""Classes that mean the same in both domains; the others are left out there."""
TRAVELS = {SENTIMENT: EMOTION, EMOTION: SENTIMENT}
SIZES = {EMOTION: (300, 1000, 3000), "banking77": (1000, 3000, 9000)}
SEEDS = (0, 1, 2)
NUM_TRAIN, NUM_TEST, RANK = 300, 400, 8
RECIPE = {"per_device_train_batch_size": 32, "learning_rate": 1e-3}
MEANS = ("parameters", "home_accuracy", "home_nll", "away_accuracy", "away_nll")
EPOCHS, STEPS = 20, 600
"""Of 300 texts, and the steps with more texts, whatever their number."""


def valence(probs: torch.Tensor, names: list[str], task: str) -> torch.Tensor:
    """P(negative), P(positive) of those two alone, (n, 2), from a task's probabilities (n, C)."""
    sums = [
        probs[:, [names.index(name) for name in group[task]]].sum(-1)
        for group in (NEGATIVE, POSITIVE)
    ]
    both = torch.stack(sums, -1)
    return both / both.sum(-1, keepdim=True)


def with_valence(table: Dataset, task: str) -> tuple[Dataset, torch.Tensor]:
    """The texts that are negative (0) or positive (1), and which."""
    names = table.features["label"].names
    of = {names.index(n): v for v, group in enumerate((NEGATIVE, POSITIVE)) for n in group[task]}
    rows = [i for i, label in enumerate(table["label"]) if label in of]
    return table.select(rows), torch.tensor([of[table["label"][i]] for i in rows])


def travel(
    model: Any, tokenizer: Any, kind: Any, task: str, data: Path, seed: int
) -> dict[str, Any]:
    """Accuracy and NLL by valence, at home and in the other domain, without training there."""
    found: dict[str, Any] = {}
    for where, other in (("home", task), ("away", TRAVELS[task])):
        _, _, test = load_task(other, str(data)).sample(NUM_TRAIN, 0, NUM_TEST, seed)
        table, labels = with_valence(test, other)
        names = load_task(task, str(data)).train.features["label"].names
        rows = kind.inputs(table, tokenizer, labels=False)
        predictive: Any = bara.predict(model, rows, progress=False)
        probs = valence(predictive.probs, names, task)
        chosen = probs[torch.arange(len(labels)), labels]
        found[f"{where}_accuracy"] = float((probs.argmax(-1) == labels).double().mean())
        found[f"{where}_nll"] = float(-chosen.log().mean())
    return found


def parameters(model: Any) -> int:
    """Numbers in an adapter's A and B."""
    return sum(p.numel() for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n)


def ranks_of(model: Any, tokenizer: Any, kind: Any, table: Dataset) -> EffectiveRank:
    return effective_rank(model, kind.inputs(table, tokenizer, labels=False), progress=False)


def profile(task: str, seed: int, data: Path) -> Iterator[dict[str, Any]]:
    """BaRA on a task: its profile, the shift on the other tasks' texts, and how it travels beside
    LoRA of its size after pruning."""
    train, _, test = load_task(task, str(data)).sample(NUM_TRAIN, 0, NUM_TEST, seed)
    fit = {"num_train_epochs": EPOCHS, **RECIPE}
    options = {"r": RANK, "lora_alpha": 2 * RANK}
    row = {"part": "profile", "task": task, "seed": seed, "method": "bara"}
    model, tokenizer, kind, _ = trained(train, seed, "bara", options, **fit)
    with autocast():
        own = ranks_of(model, tokenizer, kind, test)
        shifts = {}
        for other in PROFILES:
            if other != task:
                _, _, theirs = load_task(other, str(data)).sample(NUM_TRAIN, 0, NUM_TEST, seed)
                shift = rank_shift(own, ranks_of(model, tokenizer, kind, theirs))
                shifts[other] = {"mean": shift.mean, "auroc": shift.auroc}
        row |= {
            "layers": list(own.layers),
            "per_layer": own.per_layer.tolist(),
            "s_bar": own.s_bar,
            "inputs_sd": float(own.per_input.std(correction=0)),
            "shifts": shifts,
        }
        if task in TRAVELS:
            row |= {"parameters": parameters(model)}
            row |= travel(model, tokenizer, kind, task, data, seed)
    yield row
    if task not in TRAVELS:
        return
    with autocast():
        pruned = bara.prune(model, kind.inputs(train, tokenizer, labels=False)).model.eval()
        size = parameters(pruned)
        row = {"part": "travel", "task": task, "seed": seed, "method": "bara, pruned"}
        yield row | {"parameters": size} | travel(pruned, tokenizer, kind, task, data, seed)
    whole = parameters(model)
    small = max(1, round(RANK * size / whole))
    for rank in dict.fromkeys((small, RANK)):
        options = {"r": rank, "lora_alpha": 2 * rank}
        model, tokenizer, kind, _ = trained(train, seed, "lora", options, **fit)
        row = {"part": "travel", "task": task, "seed": seed, "rank": rank}
        with autocast():
            row |= travel(model, tokenizer, kind, task, data, seed)
        row["parameters"] = parameters(model)
        if rank == small:
            yield row | {"method": "lora of that size"}
        if rank == RANK:
            yield row | {"method": f"lora, r = {RANK}"}


def size_run(task: str, count: int, local: bool, data: Path) -> dict[str, Any]:
    """BaRA with gates that read the input or without, on a number of texts."""
    train, _, test = load_task(task, str(data)).sample(count, 0, 600, 0)
    fit = {"num_train_epochs": EPOCHS} if count <= NUM_TRAIN else {"max_steps": STEPS}
    options = {"r": RANK, "lora_alpha": 2 * RANK, "local_gate": local}
    model, tokenizer, kind, _ = trained(train, 0, "bara", options, **fit, **RECIPE)
    with autocast():
        rank = ranks_of(model, tokenizer, kind, test)
        predictive: Any = bara.predict(model, kind.inputs(test, tokenizer), progress=False)
    metrics = classification_metrics(predictive)
    return {
        "part": "size",
        "task": task,
        "texts": count,
        "local_gate": local,
        "s_bar": rank.s_bar,
        "inputs_sd": float(rank.per_input.std(correction=0)),
        **{name: metrics[name] for name in ("accuracy", "nll", "ece")},
    }


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16())


def missing_runs(data: Path, parts: list[str]) -> None:
    """Trains what is not yet in the results."""

    def done(**fields: Any) -> bool:
        return any(fields.items() <= row.items() for row in read_lines(RESULTS) if row)

    def keep(row: dict[str, Any]) -> None:
        append_row(RESULTS, row | {"versions": versions()})
        print({k: v for k, v in row.items() if not isinstance(v, list | dict)}, flush=True)

    if "profile" in parts:
        for seed in SEEDS:
            for task in PROFILES:
                last = {"part": "travel", "method": f"lora, r = {RANK}"}
                last = last if task in TRAVELS else {"part": "profile"}
                if not done(task=task, seed=seed, **last):
                    for row in profile(task, seed, data):
                        if not done(**{k: row[k] for k in ("part", "task", "seed", "method")}):
                            keep(row)
    if "size" in parts:
        for task, counts in SIZES.items():
            for count in counts:
                for local in (True, False):
                    if not done(part="size", task=task, texts=count, local_gate=local):
                        keep(size_run(task, count, local, data))


def correlation(a: list[float], b: list[float]) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def profiles_answer(rows: list[dict[str, Any]]) -> list[str]:
    """Questions 1 and 2."""
    pairs = list(combinations(rows, 2))
    within = [
        correlation(a["per_layer"], b["per_layer"]) for a, b in pairs if a["task"] == b["task"]
    ]
    between = [
        correlation(a["per_layer"], b["per_layer"]) for a, b in pairs if a["task"] != b["task"]
    ]
    lines = [
        "| task | s_bar of 8, mean over seeds | sd over layers | sd over inputs | "
        "shift on other tasks' texts | AUROC of the rank |",
        "|---|---|---|---|---|---|",
    ]
    for task in PROFILES:
        mine = [row for row in rows if row["task"] == task]
        shifts = [shift for row in mine for shift in row["shifts"].values()]
        numbers = (
            mean(row["s_bar"] for row in mine),
            mean(float(np.std(row["per_layer"])) for row in mine),
            mean(row["inputs_sd"] for row in mine),
            mean(shift["mean"] for shift in shifts),
            mean(shift["auroc"] for shift in shifts),
        )
        s_bar, layers, inputs, moved, auroc = numbers
        lines.append(
            f"| {task} | {s_bar:.2f} | {layers:.2f} | {inputs:.3f} | {moved:+.3f} | {auroc:.2f} |"
        )
    auroc = mean(shift["auroc"] for row in rows for shift in row["shifts"].values())
    says = f"correlate by {mean(between):.2f} between tasks"
    if within:
        follows = "follows" if mean(between) < mean(within) else "does not follow"
        said = (
            f"**The profile {follows} the task**: two profiles over the 18 layers {says}, and by "
            f"{mean(within):.2f} between seeds of one task."
        )
    else:
        said = f"Two profiles over the 18 layers {says}; what seeds change is not measured yet."
    answers = "answers" if auroc > 0.6 else "does not answer"
    lines += [
        "",
        f"{said} **The rank {answers} to another domain**: mean AUROC {auroc:.2f}, 0.6 was asked; "
        f"the shift itself is small. {len(rows)} trainings.",
    ]
    return lines


def travel_answer(rows: list[dict[str, Any]]) -> list[str]:
    """Question 3."""
    methods = ("bara", "bara, pruned", "lora of that size", f"lora, r = {RANK}")
    at = {(row["method"], row["task"], row["seed"]): row for row in rows}
    pairs = [
        (task, seed)
        for task in TRAVELS
        for seed in SEEDS
        if all((method, task, seed) in at for method in methods)
    ]
    lines = [
        "| trained on → read | | parameters of A, B | home accuracy / NLL | away accuracy / NLL |",
        "|---|---|---|---|---|",
    ]
    for task, other in TRAVELS.items():
        for method in methods:
            mine = [at[method, t, s] for t, s in pairs if t == task]
            if mine:
                n = {k: mean(row[k] for row in mine) for k in MEANS}
                lines.append(
                    f"| {task} → {other} | {method} | {n['parameters']:,.0f} | "
                    f"{n['home_accuracy']:.3f} / {n['home_nll']:.3f} | "
                    f"{n['away_accuracy']:.3f} / {n['away_nll']:.3f} |"
                )
    gaps = [
        at["bara, pruned", *pair]["away_nll"] - at["lora of that size", *pair]["away_nll"]
        for pair in pairs
    ]
    error = stdev(gaps) / len(gaps) ** 0.5
    better = "travels better" if mean(gaps) < -error else "does not travel better"
    lines += [
        "",
        f"**A pruned BaRA {better} than LoRA of its size**: NLL away {mean(gaps):+.3f} ± "
        f"{error:.3f} beside it ({len(pairs)} pairs of direction and seed).",
    ]
    return lines


def size_answer(rows: list[dict[str, Any]]) -> list[str]:
    """Question 4."""
    at = {(row["task"], row["texts"], row["local_gate"]): row for row in rows}
    lines = [
        "| task | texts | rank of 8, sd over inputs | with gates that read the input: accuracy / "
        "NLL / ECE | without | NLL, with less without |",
        "|---|---|---|---|---|---|",
    ]
    pays = []
    for (task, texts, local), row in at.items():
        if local and (other := at.get((task, texts, False))):
            part = row["nll"] / other["nll"] - 1
            if part < -0.01:
                pays.append(f"{task} with {texts:,}")
            shown = [f"{r['accuracy']:.3f} / {r['nll']:.3f} / {r['ece']:.3f}" for r in (row, other)]
            lines.append(
                f"| {task} | {texts:,} | {row['s_bar']:.2f}, {row['inputs_sd']:.3f} | "
                f"{' | '.join(shown)} | {part:+.1%} |"
            )
    return [*lines, "", f"**They pay by 1% of the NLL on**: {', '.join(pays) or 'none'}. One seed."]


def picture(rows: list[dict[str, Any]]) -> None:
    """The mean profiles, tasks by layers."""
    names = [name.rsplit("encoder.layer.")[-1] for name in rows[0]["layers"]]
    short = [f"{n.split('.')[0]} {n.rsplit('.')[-1]}" for n in names]
    values = [
        np.mean([row["per_layer"] for row in rows if row["task"] == task], axis=0)
        for task in PROFILES
    ]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=RANK, cmap="viridis")
    axes.set_xticks(range(len(short)), short, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(PROFILES)), PROFILES)
    figure.colorbar(image, label=f"effective rank of {RANK}")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("."), help="folder of the file tasks")
    parser.add_argument("--parts", nargs="+", default=["profile", "size"])
    parser.add_argument("--analyse", action="store_true", help="write the page; train nothing")
    arguments = parser.parse_args()
    if not arguments.analyse:
        quieten_libraries()
        missing_runs(arguments.data, arguments.parts)
    rows = read_lines(RESULTS)
    profiles = [row for row in rows if row["part"] == "profile"]
    travels = [row for row in rows if row["part"] == "travel" or row.get("home_nll")]
    picture(profiles)
    parts = [
        "### Where it goes",
        "",
        *profiles_answer(profiles),
        "",
        "![Effective rank by task and layer](images/where-the-rank-goes.png)",
        "",
        "### Whether it travels",
        "",
        *travel_answer(travels),
    ]
    if sizes := [row for row in rows if row["part"] == "size"]:
        parts += ["", "### Rank per input, by number of texts", "", *size_answer(sizes)]
    write_between(PAGE, MARK, "\n" + "\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
