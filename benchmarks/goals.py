"""The goals that were set for BaRA and BaLoRA beside what the suite measured.

    python benchmarks/goals.py

Reads benchmarks/results/suite/results.jsonl, and for equal labels those of development, and writes
the tables of docs/results/suite/goals.md, and the overview of docs/benchmarks.md: the means over
tasks, and how many goals are met. Means over the tasks of a seed, then mean ± standard error over
seeds, and only seeds that all methods have finished. The rival is the best of the other methods
that train a single model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from scipy.stats import binom

from bara.bench.page import update_page
from bara.bench.results import Row
from bara.bench.run import finished
from bara.bench.spec import Benchmark
from bara.bench.summary import ALL_TASKS, METRICS, Estimate, Table, by_seed, group, overview
from equal_labels import CHOSE, PEERS, SLICE, beside_peers
from equal_labels import finished as equal_labels

ROOT = Path(__file__).parent.parent
SUITE = ROOT / "benchmarks/suite"
RESULTS = ROOT / "benchmarks/results/suite"
OVERVIEW_PAGE = ROOT / "docs/benchmarks.md"
GOALS_PAGE = ROOT / "docs/results/suite/goals.md"
ENSEMBLE = "ensemble"
OURS = ("bara", "balora")


@dataclass(frozen=True)
class Goal:
    """A goal with what was measured."""

    text: str
    ours: str
    beside: str
    met: bool

    def cells(self) -> list[str]:
        return [self.text, self.ours, self.beside, "yes" if self.met else "no"]


def main() -> None:
    tables, counts = [], []
    for name, goals in GOALS.items():
        if rows := rows_of(name):
            seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
            lines = [goal.cells() for goal in goals(rows)]
            hours = sum(row["seconds"] for row in rows) / 3600
            title = f"{name}, seeds {seeds} ({hours:.1f} hours of one core)"
            tables.append(Table(title, ["goal", "measured", "beside", "met"], lines))
            met = [line[-1] for line in lines].count("yes")
            counts.append([name, seeds, f"{met} of {len(lines)}"])
    update_page(GOALS_PAGE, {"goals": tables}, RESULTS)
    goals = Table("Goals met", ["benchmark", "seeds", "met"], counts)
    update_page(OVERVIEW_PAGE, {"overview": [means_over_tasks(), goals]}, RESULTS)


def means_over_tasks() -> Table:
    """The rows of every method on the classification tasks together."""
    rows = finished(Benchmark.load(SUITE / "classification.yaml"), RESULTS)
    table = overview(rows, "Classification, 300 examples, means over four tasks")
    means = [row[1:] for row in table.rows if row[0] == ALL_TASKS]
    return replace(table, headings=table.headings[1:], rows=means)


def rows_of(benchmark: str) -> list[Row]:
    """What its goals are judged by."""
    if benchmark == SLICE:
        return equal_labels()
    return beside_peers() if benchmark == PEERS else whole_seeds(SUITE / f"{benchmark}.yaml")


def whole_seeds(path: Path) -> list[Row]:
    """The rows of the seeds of which no cell is missing."""
    benchmark = Benchmark.load(path)
    cells = Counter(cell.seed for cell in benchmark.cells())
    seeds = group(finished(benchmark, RESULTS), lambda row: row["seed"])
    return [row for seed in sorted(seeds) if len(seeds[seed]) == cells[seed] for row in seeds[seed]]


def classification_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    methods = group(rows, lambda row: row["name"])

    def values(method: str, metric: str) -> list[float]:
        return list(by_seed(methods[method], metric).values())

    def mean(method: str, metric: str) -> float:
        return fmean(values(method, metric))

    def rival(metric: str, less: bool) -> str:
        names = [n for n in methods if n not in (*OURS, ENSEMBLE) and values(n, metric)]
        return (min if less else max)(names, key=lambda name: mean(name, metric))

    def against(text: str, ours: tuple[str, str], other: tuple[str, str], least: float) -> Goal:
        """Ours is better than the other by more than `least`, in the metric's good direction."""
        pairs = zip(values(*ours), values(*other), strict=True)
        difference = Estimate.of([a - b for a, b in pairs])
        better = (
            difference.mean if METRICS[ours[1].split(".")[-1]].less is False else -difference.mean
        )
        beside = f"{other[0]} {mean(*other):.3f}, difference {signed(difference)}"
        return Goal(text, show(values(*ours)), beside, better > least)

    for metric in ("nll", "brier"):
        scaled = f"temperature.{metric}"
        name = METRICS[metric].heading
        for text, ours, other in (
            (f"BaRA: {name} lowest", metric, metric),
            (f"BaRA without temperature: {name} below all others with one", metric, scaled),
            (f"BaRA: {name} lowest, all with a temperature", scaled, scaled),
        ):
            yield against(text, ("bara", ours), (rival(other, less=True), other), 0)
    ece, lora_ece = mean("bara", "ece"), mean("lora", "ece")
    beside = f"perfectly calibrated, with its confidences: {calibrated_ece(methods['bara']):.3f}"
    yield Goal("BaRA: ECE at most 0.05", show(values("bara", "ece")), beside, ece <= 0.05)
    beside = f"lora {lora_ece:.3f}, ratio {ece / lora_ece:.2f}"
    yield Goal("BaRA: ECE at most 0.4 of LoRA's", f"{ece:.3f}", beside, ece <= 0.4 * lora_ece)
    text = "BaRA: accuracy at least 0.005 above LoRA's"
    yield against(text, ("bara", "accuracy"), ("lora", "accuracy"), 0.005)
    best = rival("ood_auroc", less=False)
    yield against("BaRA: OOD AUROC highest", ("bara", "ood_auroc"), (best, "ood_auroc"), 0)
    nll, of_ensemble = mean("bara", "nll"), mean(ENSEMBLE, "nll")
    beside = f"ensemble {of_ensemble:.3f}; {cost(methods['bara'], methods[ENSEMBLE])}"
    text = "BaRA: NLL at most 1.02 of an ensemble's of 5"
    yield Goal(text, f"{nll:.3f}", beside, nll <= 1.02 * of_ensemble)
    yield against("BaLoRA: NLL below BLoB's", ("balora", "nll"), ("blob", "nll"), 0)
    text = "BaLoRA, mean mode: accuracy above LoRA's"
    yield against(text, ("balora", "deterministic.accuracy"), ("lora", "accuracy"), 0)
    spread = fmean(row["rank_inputs_sd"] for row in methods["bara"])
    # a cell where the rank does not vary has no correlation
    error = fmean(row.get("rank_error_spearman", 0.0) for row in methods["bara"])
    text = "BaRA: harder inputs use more rank"
    beside = "rank correlation of an input's rank with its loss, mean over tasks"
    yield Goal(text, f"{error:+.3f}", beside, error > 0.1)
    text = "BaRA: the rank varies between inputs"
    yield Goal(text, f"sd {spread:.3f}", f"s_bar {mean('bara', 's_bar'):.2f}", spread > 0.1)


def equal_label_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    methods = group(rows, lambda row: row["name"])
    ours, *peers = sorted(methods, key=lambda name: name != "bara as it is")

    def values(method: str, metric: str) -> list[float]:
        return list(by_seed(methods[method], metric).values())

    for metric in ("nll", "brier"):
        for peer in peers:
            mine, theirs = values(ours, metric), values(peer, metric)
            below = Estimate.of([100 * (1 - a / b) for a, b in zip(mine, theirs, strict=True)])
            text = f"{ours}: {METRICS[metric].heading} at least 5% below that of {peer}"
            beside = f"{peer} {fmean(theirs):.3f}, {below.mean:.1f} ± {below.error:.1f}% below"
            yield Goal(text, show(mine), beside, below.mean >= 5)
    for peer in peers:
        mine, theirs = values(ours, "accuracy"), values(peer, "accuracy")
        above = Estimate.of([a - b for a, b in zip(mine, theirs, strict=True)])
        text = f"{ours}: accuracy at least 0.01 above that of {peer}"
        beside = f"{peer} {fmean(theirs):.3f}, difference {signed(above)}"
        yield Goal(text, show(mine), beside, above.mean >= 0.01)
    ece = values(ours, "ece")
    yield Goal(f"{ours}: ECE at most 0.05", show(ece), "", fmean(ece) <= 0.05)
    by_task = group(rows, lambda row: (row["task"], row["name"]))
    nll = {key: fmean(row["nll"] for row in mine) for key, mine in by_task.items()}
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    worse = [task for task in tasks if nll[task, ours] > nll[task, "probe"]]
    beside = f"above it: {', '.join(worse) or 'nowhere'}"
    yield Goal(f"{ours}: NLL nowhere above the probe's", f"{len(tasks)} tasks", beside, not worse)


def peer_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    methods = group(rows, lambda row: row["name"])

    def mean(method: str, metric: str) -> float:
        return fmean(by_seed(methods[method], metric).values())

    for ours in ("bara as it is", CHOSE):
        for metric, text in (
            ("nll", "NLL at least 5% below that of every peer that chose"),
            ("brier", "Brier at least 5% below that of every peer that chose"),
            ("accuracy", "accuracy at least 0.01 above that of every peer that chose"),
        ):
            less = METRICS[metric].less is not False
            others = [name for name in methods if not name.startswith("bara")]
            best = (min if less else max)(others, key=lambda name: mean(name, metric))
            mine, theirs = mean(ours, metric), mean(best, metric)
            lead = 1 - mine / theirs if less else mine - theirs
            beside = f"the best, {best} {theirs:.3f}: " + (
                f"{lead:.1%}" if less else f"{lead:+.3f}"
            )
            met = lead >= (0.05 if less else 0.01)
            yield Goal(f"{ours}: {text}", f"{mine:.3f}", beside, met)
        ece = mean(ours, "ece")
        yield Goal(f"{ours}: ECE at most 0.05", f"{ece:.3f}", "", ece <= 0.05)


def cost(ours: Sequence[Row], theirs: Sequence[Row]) -> str:
    """The ratio of training times, over cells of one task and seed with the same versions: others
    were measured in another session, perhaps on another machine."""
    ours_by, theirs_by = (
        {(row["task"], row["seed"], str(row["versions"])): row["seconds_train"] for row in rows}
        for rows in (ours, theirs)
    )
    ratios = [ours_by[key] / theirs_by[key] for key in ours_by if key in theirs_by]
    if not ratios:
        return "training times were not measured together"
    return f"training takes {fmean(ratios):.2f} of its time ({len(ratios)} cells each)"


def calibrated_ece(rows: Sequence[Row]) -> float:
    """The mean ECE that chance alone gives, were every confidence the probability to be right.

    Per bin E|K/n - c| with K ~ Binomial(n, c): of n answers, K right at the mean confidence c.
    """

    def expected(row: Row) -> float:
        curve = row["reliability"]
        deviation = 0.0
        for count, confidence in zip(curve["count"], curve["confidence"], strict=True):
            if n := int(count):
                right = range(n + 1)
                deviation += binom.pmf(right, n, confidence) @ [
                    abs(k - n * confidence) for k in right
                ]
        return deviation / sum(curve["count"])

    return fmean(expected(row) for row in rows)


def rank_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    runs = group(rows, lambda row: (row["name"], row["rank"]))
    ranks = sorted({row["rank"] for row in rows if row["rank"] >= 8})

    def along(method: str, metric: str) -> list[float]:
        return [fmean(by_seed(runs[method, rank], metric).values()) for rank in ranks]

    at = f"r = {', '.join(map(str, ranks))}"
    s_bar = along("bara", "s_bar")
    text = "BaRA: s_bar at all ranks within 15%"
    shown = ", ".join(f"{s:.2f}" for s in s_bar)
    yield Goal(text, f"{shown} at {at}", "", max(s_bar) <= 1.15 * min(s_bar))
    for method, grows in (("bara", False), ("lora", True)):
        nll = along(method, "nll")
        text = f"{method}: NLL {'grows' if grows else 'does not grow'} with r"
        met = (nll[-1] > 1.02 * nll[0]) is grows
        yield Goal(text, f"{', '.join(f'{v:.3f}' for v in nll)} at {at}", "", met)


def regression_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    methods = group(rows, lambda row: row["name"])
    draws = sorted(map(int, methods["balora"][0]["by_draws"]))

    def mean(method: str, metric: str) -> float:
        return fmean(by_seed(methods[method], metric).values())

    for part, metric in (("", "spearman"), (", epistemic part", "spearman_epistemic")):
        counts = [count for count in draws if metric == "spearman" or count > 1]
        ours = [mean("balora", f"by_draws.{count}.{metric}") for count in counts]
        theirs = mean(ENSEMBLE, metric)
        shown, at = ", ".join(f"{v:.3f}" for v in ours), ", ".join(map(str, counts))
        text = f"BaLoRA{part}: Spearman correlation with the error above an ensemble's"
        yield Goal(text, f"{ours[-1]:.3f}", f"ensemble {theirs:.3f}", ours[-1] > theirs)
        text = f"BaLoRA{part}: it rises with draws"
        yield Goal(text, f"{shown} with {at} draws", "", ours[-1] > ours[0])
    balora, lora = mean("balora", "rmse"), mean("lora", "rmse")
    text = "BaLoRA: RMSE not above LoRA's"
    yield Goal(text, f"{balora:.3f}", f"lora {lora:.3f}", balora <= lora)


def show(values: Sequence[float]) -> str:
    estimate = Estimate.of(values)
    return f"{estimate.mean:.3f} ± {estimate.error:.3f}"


def signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f} ± {estimate.error:.3f}"


GOALS = {
    SLICE: equal_label_goals,
    PEERS: peer_goals,
    "classification": classification_goals,
    "ranks": rank_goals,
    "band-gap": regression_goals,
}

if __name__ == "__main__":
    main()
