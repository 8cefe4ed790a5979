"""Does plain LoRA with the ranks that BaRA recommends do better than with a fixed rank?

    python benchmarks/rank_recommendation.py --data FOLDER
    python benchmarks/rank_recommendation.py --analyse

For every task and seed: BaRA at r = 16 gives the ranks; LoRA is trained anew with them and with
r = 4, 8 and 16, on the same texts with the same scaling. FOLDER has `tweet_eval_emotion` and
`tweet_eval_irony` as `bara bench --data` reads them; the third task comes with a package. Every
finished run is appended to benchmarks/results/rank_recommendation.jsonl at once; a second run goes
on where the first stopped. The analysis writes docs/rank-recommendation.md
and the verdict in docs/ranks-and-export.md.

Decided before the run: the recommendation pays if LoRA's accuracy with it, averaged over tasks and
seeds, is above that of every fixed rank with no more parameters, and not more than one point below
that of the best fixed rank. What BaRA's own training costs is not counted; the page says it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from bara.bench.results import append_row, read_lines
from bara.bench.tasks import load_task
from bara.evaluation.evaluate import evaluate
from bara.files import atomic_write_text
from bara.machine import fast_bfloat16, quieten_libraries, versions
from bara.ranks.effective_rank import effective_rank
from bara.ranks.recommendation import recommend_ranks
from pages import write_between
from small_texts import trained

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/rank_recommendation.jsonl"
PAGE = ROOT / "docs/rank-recommendation.md"
GUIDE = ROOT / "docs/ranks-and-export.md"
MARK = "recommendation-verdict"

TASKS = ("tweet_eval_emotion", "tweet_eval_irony", "tweet-sentiment")
FIXED = ("4", "8", "16")
SEARCH = "search"
RECOMMENDED = "recommended"
SEARCH_RANK = 16
SCALING = 2
NUM_TRAIN, NUM_TEST, STEPS, BATCH_SIZE = 300, 700, 150, 16
TOLERANCE = 0.01
BEFORE = " as they stood on 28 November 2026, before BaRA's head had a pace of its own"
"""What the versions of the committed rows, which are of a development version, do not say."""


def run(task: str, seed: int, ranks: str, data: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Trains one adapter and measures it; the search also measures the effective rank."""
    train, _, test = load_task(task, data).sample(NUM_TRAIN, 0, NUM_TEST, seed)
    method = "bara" if ranks == SEARCH else "lora"
    steps = {"max_steps": STEPS, "per_device_train_batch_size": BATCH_SIZE}
    model, tokenizer, kind, seconds = trained(train, seed, method, options, **steps)
    result: dict[str, Any] = {"task": task, "seed": seed, "ranks": ranks, "seconds": seconds}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bfloat16()):
        if ranks == SEARCH:
            rank = effective_rank(model, kind.inputs(train, tokenizer), progress=False)
            recommended = recommend_ranks(model, rank)
            result |= {
                "s_bar": rank.s_bar,
                "config": recommended.config_options(),
                "parameters": recommended.full_parameters,
            }
        else:
            result["parameters"] = sum(
                parameter.numel()
                for name, parameter in model.named_parameters()
                if "lora_A" in name or "lora_B" in name
            )
        rows = kind.inputs(test, tokenizer)
        metrics = evaluate(model, rows, deterministic=True, progress=False, batch_size=256).metrics
    result |= {name: metrics[name] for name in ("accuracy", "nll", "ece")}
    return result | {"num_test": len(test), "versions": versions()}


def missing_runs(tasks: list[str], seeds: list[int], data: Path) -> None:
    """Trains what is not yet in the results."""
    for seed in seeds:
        for task in tasks:
            for ranks in (SEARCH, RECOMMENDED, *FIXED):
                done = {
                    row["ranks"]: row
                    for row in read_lines(RESULTS)
                    if (row["task"], row["seed"]) == (task, seed)
                }
                if ranks in done:
                    continue
                if ranks == RECOMMENDED:
                    options = done[SEARCH]["config"]
                else:
                    r = SEARCH_RANK if ranks == SEARCH else int(ranks)
                    options = {"r": r, "lora_alpha": SCALING * r}
                row = run(task, seed, ranks, data, options)
                append_row(RESULTS, row)
                print(task, seed, ranks, f"accuracy {row['accuracy']:.3f}", flush=True)


def whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the pairs of task and seed of which all are there."""
    kinds = {SEARCH, RECOMMENDED, *FIXED}

    def pair(row: dict[str, Any]) -> tuple[str, int]:
        return row["task"], row["seed"]

    return [row for row in rows if {r["ranks"] for r in rows if pair(r) == pair(row)} == kinds]


def averages(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over tasks and seeds by kind of ranks."""
    kinds = (*FIXED, RECOMMENDED)
    columns = ("accuracy", "nll", "ece", "parameters")
    return {
        kind: {name: mean(row[name] for row in rows if row["ranks"] == kind) for name in columns}
        for kind in kinds
    }


def verdict(table: dict[str, dict[str, float]]) -> tuple[bool, str]:
    """Whether the recommendation pays by the rule above, and the numbers that say so."""
    ours = table[RECOMMENDED]
    fixed = {kind: table[kind] for kind in FIXED}
    smaller = {k: v for k, v in fixed.items() if v["parameters"] <= ours["parameters"]}
    beaten = all(ours["accuracy"] > row["accuracy"] for row in smaller.values())
    best = max(fixed, key=lambda kind: fixed[kind]["accuracy"])
    behind = fixed[best]["accuracy"] - ours["accuracy"]
    pays = beaten and behind <= TOLERANCE
    compared = ", ".join(f"r = {k} {row['accuracy']:.3f}" for k, row in smaller.items())
    text = (
        f"Accuracy with the recommendation is {ours['accuracy']:.3f}; of fixed ranks with no more "
        f"parameters: {compared or 'there is none'}; of the best fixed rank, r = {best}: "
        f"{fixed[best]['accuracy']:.3f}. NLL is {ours['nll']:.3f}, and {fixed[best]['nll']:.3f} "
        f"with r = {best}, which has {fixed[best]['parameters'] / ours['parameters']:.1f} times "
        "the parameters."
    )
    return pays, text


def measured(rows: list[dict[str, Any]]) -> str:
    """With which versions, as the rows say."""
    names = ("bara-peft", "torch", "transformers", "peft")
    sets = {tuple(row["versions"][name] for name in names) for row in rows}
    said = "; ".join(
        ", ".join(f"{name} {version}" for name, version in zip(names, of_run, strict=True))
        for of_run in sorted(sets)
    )
    return f"Measured with {said}{BEFORE}."


def write_page(rows: list[dict[str, Any]]) -> None:
    """The verdict, the averages and every run."""
    table = averages(rows)
    pays, numbers = verdict(table)
    search = [row for row in rows if row["ranks"] == SEARCH]
    seeds = sorted({row["seed"] for row in rows})
    pairs = sorted({(row["task"], row["seed"]) for row in rows})
    tasks = sorted({task for task, _ in pairs})
    at = {(row["task"], row["seed"], row["ranks"]): row for row in rows}
    differences = {
        kind: [at[*pair, RECOMMENDED]["accuracy"] - at[*pair, kind]["accuracy"] for pair in pairs]
        for kind in FIXED
    }
    said = f"The recommendation {'pays' if pays else 'does not pay'}"
    where = f"on {len(tasks)} tasks with {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    guide = (
        f"**{said}** {where}. {numbers} Every run, and the rule that decides: "
        "[rank-recommendation.md](rank-recommendation.md)."
    )
    write_between(GUIDE, MARK, guide)
    lines = [
        "# Which rank for plain LoRA?",
        "",
        "Made by `python benchmarks/rank_recommendation.py --analyse` from "
        "`benchmarks/results/rank_recommendation.jsonl`; do not edit. The runs are those of "
        "`python benchmarks/rank_recommendation.py --data FOLDER`.",
        "",
        f"**{said}** by the rule that was written down before the runs: its accuracy must be above "
        "that of every fixed rank with no more parameters, and at "
        f"most {100 * TOLERANCE:g} point below that of the best fixed rank. {numbers}",
        "",
        f"{len(tasks)} tasks and {len(seeds)} seed{'s' * (len(seeds) > 1)} "
        f"({', '.join(map(str, seeds))}) are few. {measured(rows)} MiniLM-L6, "
        f"{NUM_TRAIN} texts, {STEPS} steps of {BATCH_SIZE}, {rows[0]['num_test']} test texts at "
        f"most, lora_alpha = {SCALING} r in every layer. BaRA was trained with r = {SEARCH_RANK} "
        "for the recommendation, which costs more than a training of LoRA ([speed](speed.md)) and "
        "is not in the table. Its effective rank was "
        f"{mean(row['s_bar'] for row in search):.2f} on average.",
        "",
        "| LoRA with | accuracy | NLL | ECE | parameters of A and B | accuracy of the "
        "recommendation less this one's, mean ± sd over pairs |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in table.items():
        name = "the recommendation" if kind == RECOMMENDED else f"r = {kind}"
        gap = ""
        if kind in differences:
            values = differences[kind]
            gap = f"{mean(values):+.3f} ± {stdev(values):.3f}"
        lines.append(
            f"| {name} | {row['accuracy']:.3f} | {row['nll']:.3f} | {row['ece']:.3f} | "
            f"{row['parameters']:,.0f} | {gap} |"
        )
    lines += [
        "",
        "## Every run",
        "",
        "| task | seed | | accuracy | NLL | ECE | parameters | s_bar |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in pairs:
        for kind in (SEARCH, RECOMMENDED, *FIXED):
            row = at[*pair, kind]
            name = f"BaRA, r = {SEARCH_RANK}" if kind == SEARCH else f"LoRA, {kind}"
            rank = f"{row['s_bar']:.2f}" if kind == SEARCH else ""
            lines.append(
                f"| {pair[0]} | {pair[1]} | {name} | {row['accuracy']:.3f} | {row['nll']:.3f} | "
                f"{row['ece']:.3f} | {row['parameters']:,} | {rank} |"
            )
    lines += ["", "## The ranks", "", "| task | seed | r | ranks of the other layers |"]
    lines.append("|---|---|---|---|")
    for row in search:
        ranks = sorted(row["config"]["rank_pattern"].values())
        shown = ", ".join(map(str, ranks))
        lines.append(f"| {row['task']} | {row['seed']} | {row['config']['r']} | {shown} |")
    atomic_write_text(PAGE, "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("."), help="folder of the file tasks")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--analyse", action="store_true", help="write the page; train nothing")
    arguments = parser.parse_args()
    if not arguments.analyse:
        quieten_libraries()
        missing_runs(arguments.tasks, arguments.seeds, arguments.data)
    write_page(whole(read_lines(RESULTS)))


if __name__ == "__main__":
    main()
