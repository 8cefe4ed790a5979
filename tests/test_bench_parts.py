"""The parts of the benchmark against computations of their own: corruptions, tasks, tables."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from scipy import stats

from bara import BaraError, ClassificationPredictive, RegressionPredictive
from bara.bench.corruptions import corrupt
from bara.bench.figures import figures
from bara.bench.measure import (
    by_draws,
    curves,
    metrics_of,
    rank_correlation,
    rank_numbers,
)
from bara.bench.page import update_pages
from bara.bench.results import append_row, read_rows, write_csv
from bara.bench.spec import Benchmark
from bara.bench.summary import (
    by_seed,
    estimate,
    metric_groups,
    number,
    overview,
    paired_difference,
    tables,
)
from bara.bench.tasks import Splits, load_task, task_version
from bara.language.question import Question
from bara.ranks.effective_rank import EffectiveRank
from conftest import write_jsonl

TEXTS = [" ".join(f"word{i}x{j}" for j in range(40)) for i in range(50)]


def changed(text: str, other: str) -> int:
    return sum(a != b for a, b in zip(text.split(), other.split(), strict=True))


def test_typos_reach_the_share_of_words_that_severity_says():
    for severity in (1, 3, 5):
        corrupted = corrupt(TEXTS, "typo", severity)
        hit = sum(map(changed, TEXTS, corrupted)) / (50 * 40)
        assert hit == pytest.approx(0.1 * severity, abs=0.03)
        for text, other in zip(TEXTS, corrupted, strict=True):
            for word, typo in zip(text.split(), other.split(), strict=True):
                assert abs(len(word) - len(typo)) <= 1
                same = (Counter(word) & Counter(typo)).total()
                assert same >= len(word) - 1  # one letter at most is another


def test_drop_leaves_words_out_and_keeps_their_order():
    for severity in (1, 5):
        corrupted = corrupt(TEXTS, "drop", severity)
        kept = sum(len(text.split()) for text in corrupted) / (50 * 40)
        assert kept == pytest.approx(1 - 0.1 * severity, abs=0.03)
        for text, other in zip(TEXTS, corrupted, strict=True):
            words = text.split()
            positions = [words.index(word) for word in other.split()]
            assert positions == sorted(positions)
    assert corrupt(["alone"], "drop", 5) == ["alone"]


def test_shuffle_keeps_the_words():
    for severity in (1, 5):
        corrupted = corrupt(TEXTS, "shuffle", severity)
        for text, other in zip(TEXTS, corrupted, strict=True):
            assert sorted(text.split()) == sorted(other.split())
        moved = sum(map(changed, TEXTS, corrupted)) / (50 * 40)
        # One of k words that are shuffled stays where it was, in expectation.
        assert moved == pytest.approx(0.2 * severity - 1 / 40, abs=0.03)


@pytest.mark.parametrize("kind", ["typo", "drop", "shuffle"])
def test_corruptions_are_seeded_and_nested(kind):
    assert corrupt(TEXTS, kind, 3, seed=1) == corrupt(TEXTS, kind, 3, seed=1)
    assert corrupt(TEXTS, kind, 3, seed=1) != corrupt(TEXTS, kind, 3, seed=2)
    # A text's corruption does not depend on the texts beside it.
    assert corrupt(TEXTS, kind, 3)[:5] == corrupt(TEXTS[:5], kind, 3)
    if kind == "typo":
        weak, strong = corrupt(TEXTS, kind, 2), corrupt(TEXTS, kind, 4)
        for text, a, b in zip(TEXTS, weak, strong, strict=True):
            for word, once, twice in zip(text.split(), a.split(), b.split(), strict=True):
                assert once in (word, twice)


def test_metrics_by_number_of_draws_are_those_of_the_mixture_of_the_first():
    torch.manual_seed(0)
    means, labels = torch.randn(5, 40), torch.randn(40)
    variances = torch.rand(5, 40) + 0.1
    found = by_draws(RegressionPredictive(means, variances, labels), [1, 2, 5, 10])
    assert list(found) == ["1", "2", "5"]
    for count in (2, 5):
        m, v = means[:count], variances[:count]
        total = v.mean(0) + m.var(0, correction=0)
        error = (m.mean(0) - labels).abs()
        expected = stats.spearmanr(total, error).statistic
        assert found[str(count)]["spearman"] == pytest.approx(expected, abs=1e-5)
        epistemic = stats.spearmanr(m.var(0, correction=0), error).statistic
        assert found[str(count)]["spearman_epistemic"] == pytest.approx(epistemic, abs=1e-5)
    assert "spearman_epistemic" not in found["1"]


def test_rank_against_error_only_where_the_rank_varies():
    torch.manual_seed(0)
    predictive = ClassificationPredictive(
        torch.randn(3, 30, 4).log_softmax(-1), torch.arange(30) % 4
    )
    error = -predictive.log_probs[range(30), torch.arange(30) % 4]
    soft = torch.rand(2, 30) * 8
    found = rank_numbers(EffectiveRank(("a", "b"), (8, 8), soft, soft), predictive)
    expected = stats.spearmanr(soft.mean(0), error).statistic
    assert found["rank_error_spearman"] == pytest.approx(expected, abs=1e-5)
    full = torch.full((2, 30), 8.0)
    found = rank_numbers(EffectiveRank(("a", "b"), (8, 8), full, full), predictive)
    assert found["s_bar"] == 8
    assert "rank_error_spearman" not in found


def test_rank_correlation_of_a_constant_is_zero():
    assert rank_correlation(torch.ones(4), torch.arange(4.0)) == 0


def test_temperature_scales_every_draw():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 20, 4), torch.randint(4, (20,))
    predictive = ClassificationPredictive(logits.log_softmax(-1), labels)
    scaled = metrics_of(predictive.tempered(2.5))
    probs = (logits / 2.5).softmax(-1).mean(0)
    expected = -probs[range(20), labels].log().mean()
    assert scaled["nll"] == pytest.approx(expected.item(), rel=1e-5)


def test_curves_hold_what_the_figures_show():
    probs = torch.tensor([[0.9, 0.1], [0.85, 0.15], [0.4, 0.6], [0.3, 0.7]])
    labels = torch.tensor([0, 1, 1, 0])
    found = curves(ClassificationPredictive(probs.log().unsqueeze(0), labels))
    assert found["risk_coverage"]["risk"] == pytest.approx([0, 0.5, 2 / 3, 0.5], abs=1e-4)
    bins = found["reliability"]
    assert sum(bins["count"]) == 4
    top = [i for i, count in enumerate(bins["count"]) if count][-1]
    assert bins["confidence"][top] == pytest.approx(0.9)
    assert bins["accuracy"][top] == 1


def row(name: str, task: str, seed: int, nll: float, **more: object) -> dict[str, object]:
    setting = {"train_size": 30, "rank": 8, "epochs": 1.0, "seconds_train": 1.0}
    return {
        "name": name,
        "task": task,
        "seed": seed,
        "nll": nll,
        "accuracy": 0.5,
        **setting,
        **more,
    }


ROWS = [
    row("lora", "a", 0, 1.0),
    row("lora", "a", 1, 2.0),
    row("lora", "a", 2, 4.0),
    row("lora", "b", 0, 3.0),
    row("lora", "b", 1, 5.0),
    row("bara", "a", 0, 0.5, s_bar=3.0),
    row("bara", "a", 1, 1.0, s_bar=5.0),
    row("bara", "b", 0, 2.0, s_bar=1.0),
    row("bara", "b", 1, 5.0, s_bar=1.0),
]


def of(name: str) -> list[dict[str, object]]:
    return [row for row in ROWS if row["name"] == name]


def test_means_are_over_tasks_and_then_over_seeds():
    assert by_seed(of("lora"), "nll") == {0: 2.0, 1: 3.5}  # seed 2 lacks task b
    found = estimate(of("lora"), "nll")
    assert found is not None
    assert (found.mean, found.count) == (2.75, 2)
    assert found.error == pytest.approx(stats.sem([2.0, 3.5]))


def test_differences_are_paired_by_seed():
    found = paired_difference(of("bara"), of("lora"), "nll")
    assert found is not None
    assert found.mean == pytest.approx(((1.25 - 2.0) + (3.0 - 3.5)) / 2)
    assert found.error == pytest.approx(stats.sem([-0.75, -0.5]))
    assert paired_difference(of("bara"), of("lora"), "s_bar") is None


def test_tables_show_means_and_differences():
    shown = {table.title: table for table in tables(ROWS, "suite")}
    means = shown["suite, predictions: mean ± standard error"]
    nll = means.headings.index("NLL")
    lines = {(line[0], line[1]): line for line in means.rows}
    assert lines["mean over tasks", "lora"][nll] == "2.750 ± 0.750"
    assert lines["a", "lora"][nll].startswith("2.333 ± 0.88")
    differences = shown["suite, predictions: difference to lora, paired by seed"]
    lines = {(line[0], line[1]): line for line in differences.rows}
    assert lines["mean over tasks", "bara"][nll] == "-0.625 ± 0.125"
    assert ("mean over tasks", "lora") not in lines
    rank = shown["suite, rank and cost: mean ± standard error"]
    assert {line[1]: line for line in rank.rows}["lora"][rank.headings.index("s_bar")] == "–"
    assert "| 2.750 ± 0.750 |" in means.to_markdown()
    assert overview(ROWS, "suite").rows[0][:3] == ["mean over tasks", "lora", "2"]


def test_a_method_without_all_tasks_has_no_mean_over_them():
    unfinished = row("blob", "a", 0, 0.1)
    lines = overview([*ROWS, unfinished], "suite").rows
    assert ["blob" in line for line in lines if line[0] == "mean over tasks"] == [False, False]
    assert any(line[:2] == ["a", "blob"] for line in lines)


def test_figures_follow_what_varies():
    curve = {"risk_coverage": {"coverage": [0.5, 1.0], "risk": [0.1, 0.2]}}
    bins = {"reliability": {"confidence": [None, 0.7], "accuracy": [None, 0.6], "count": [0, 9]}}
    draws = {"by_draws": {"1": {"nll": 1.0}, "5": {"nll": 0.9}}, "shift": {"typo-1": {"nll": 2.0}}}
    rows = [r | curve | bins | draws for r in ROWS]
    names = {"reliability", "risk-coverage", "shift", "draws", "cost"}
    assert figures(rows).keys() == names
    sizes = [r | {"train_size": size} for r in rows for size in (10, 100)]
    assert figures(sizes).keys() == {"low-data-nll", "low-data-s_bar"}


def test_a_cut_line_is_lost_and_no_other(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    append_row(path, {"key": "a", "nll": math.inf, "nested": {"x": [math.nan, 1.0]}})
    append_row(path, {"key": "b", "error": "no"})
    with path.open("a") as file:
        file.write('{"key": "c", "nl')
    assert read_rows(path).keys() == {"a", "b"}
    append_row(path, {"key": "b", "nll": 2.0})
    rows = read_rows(path)
    assert rows["b"] == {"key": "b", "nll": 2.0}
    assert rows["a"] == {"key": "a", "nll": None, "nested": {"x": [None, 1.0]}}
    assert len(path.read_text().splitlines()) == 3
    append_row(path, {"key": "b", "error": "of another process"})
    assert read_rows(path)["b"] == {"key": "b", "nll": 2.0}
    write_csv(tmp_path / "results.csv", [{"key": "a", "shift": {"typo-1": {"nll": 1.5}}}])
    assert (tmp_path / "results.csv").read_text() == "key,shift.typo-1.nll\na,1.5\n"
    path.write_text("{}\n")
    with pytest.raises(BaraError, match="line 1 is damaged"):
        read_rows(path)


def test_file_tasks_keep_their_classes_and_change_version(tmp_path: Path):
    folder = tmp_path / "films"
    folder.mkdir()
    train = [{"text": f"text {i}", "label": "good" if i < 9 else "bad"} for i in range(10)]
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", train[:4])
    splits = load_task("films", tmp_path)
    few, validation, test = splits.sample(3, 5, 100, seed=1)
    assert splits.kind == "text"
    assert few.features["label"].names == ["bad", "good"]
    assert (len(few), len(validation), len(test)) == (3, 5, 4)
    assert not set(few["text"]) & set(validation["text"])
    assert splits.sample(3, 5, 2, seed=1)[2]["text"] == splits.sample(3, 5, 2, seed=2)[2]["text"]
    with pytest.raises(BaraError, match="11 training examples"):
        splits.sample(11, 0, 1, seed=0)
    before = task_version("films", tmp_path)
    write_jsonl(folder / "test.jsonl", train[:5])
    assert task_version("films", tmp_path) != before
    with pytest.raises(BaraError, match="did you mean 'films'"):
        load_task("film", tmp_path)


def test_questions_with_a_choice_twice_are_left_out(tmp_path: Path):
    folder = tmp_path / "quiz"
    folder.mkdir()
    rows = [
        {"question": "a?", "choices": ["x", "y", "x "], "answer": 0},
        {"question": "b?", "choices": ["x", "y", "z"], "answer": 2},
    ]
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    splits = load_task("quiz", tmp_path)
    assert splits.kind == splits.recipe_task == "multiple-choice"
    assert splits.test["question"] == splits.train["question"] == ["b?"]


def test_image_tasks_from_files_are_pixels_and_their_version_is_of_the_images_too(tmp_path: Path):
    folder = tmp_path / "colours"
    folder.mkdir()
    colours = {"red": (255, 0, 0), "grey": (51, 51, 51)}
    for name, colour in colours.items():
        Image.new("RGB", (20, 30), colour).save(folder / f"{name}.png")
    rows = [{"image": f"{name}.png", "label": name} for name in colours]
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    splits = load_task("colours", tmp_path)
    assert splits.kind == "image"
    assert splits.train.features["label"].names == ["grey", "red"]
    pixels = splits.train["pixel_values"][:]  # 0 to 255 become -1 to 1, channels first
    assert pixels.shape == (2, 3, 64, 64)
    assert torch.allclose(pixels[0], torch.tensor([1.0, -1, -1])[:, None, None])
    assert torch.allclose(pixels[1], torch.tensor(-0.6))
    before = task_version("colours", tmp_path)
    Image.new("RGB", (20, 30), (0, 0, 255)).save(folder / "red.png")
    assert task_version("colours", tmp_path) != before


def test_package_tasks():
    splits = load_task("bbc-news")
    assert len(splits.train.features["label"].names) == 5
    assert not set(splits.train["text"]) & set(splits.test["text"])
    assert load_task("digits").kind == "image"


def test_labels_of_file_tasks_are_read_as_train_reads_them(tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    rows = [{"text": "good", "label": 1}, {"text": "bad", "label": 2}]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", [{"text": "fine", "label": 2.0}])  # as pandas writes them
    splits = load_task("task", tmp_path)
    assert splits.train.features["label"].names == ["1", "2"]
    assert splits.test["label"][:] == [1]
    write_jsonl(folder / "train.jsonl", [*rows, {"text": "?", "label": None}])  # no class "None"
    with pytest.raises(BaraError, match="empty, NaN or infinite in row 3"):
        load_task("task", tmp_path)


def test_a_number_of_a_task_with_a_dot_in_its_name():
    row = {"nll": 1.0, "temperature": {"nll": 2.0}, "transfer": {"reviews.v2": {"nll": 3.0}}}
    names = ("nll", "temperature.nll", "transfer.reviews.v2.nll", "transfer.reviews.nll", "other")
    assert [number(row, name) for name in names] == [1, 2, 3, None, None]
    assert "transfer.reviews.v2.nll" in metric_groups([row])["transfer"]


def test_a_target_is_a_regression_whatever_its_numbers():
    zeros = Dataset.from_dict({"text": ["a", "b"], "target": [0.0, 1.0]})
    assert Splits(zeros, zeros).recipe_task == "regression"
    classes = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    assert Splits(classes, classes).recipe_task is None


def test_hub_tasks_have_the_papers_prompts_and_splits(monkeypatch: pytest.MonkeyPatch):
    tables = {
        ("allenai/winogrande", "winogrande_s"): {
            "sentence": "The cup was in the box until _ broke.",
            "option1": "the cup",
            "option2": "the box",
            "answer": "2",
        },
        ("allenai/ai2_arc", "ARC-Easy"): {
            "id": "1",
            "question": "What do plants need?",
            "choices": {"text": ["Light.", "Noise", "Sand"], "label": ["1", "2", "3"]},
            "answerKey": "1",
        },
        ("allenai/openbookqa", "main"): {
            "question_stem": "Predators eat",
            "choices": {"text": ["lions", "bunnies"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        ("google/boolq", None): {
            "question": "is water wet",
            "passage": "Water makes things wet.",
            "answer": True,
        },
    }

    def load_dataset(repository: str, config: str | None = None) -> DatasetDict:
        table = Dataset.from_list([tables[repository, config]])
        return DatasetDict(train=table, validation=table)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    select = "Select one of the choices that answers the following question: "
    expected = {
        "winogrande_s": (
            f"{select}The cup was in the box until _ broke. "
            "Choices: A. the cup. B. the box. Answer:",
            ["A", "B"],
            1,
        ),
        "arc_easy": (
            f"{select}What do plants need? Choices: A. Light. B. Noise. C. Sand. Answer:",
            ["A", "B", "C"],
            0,
        ),
        "openbookqa": (
            f"{select}Predators eat Choices: A. lions. B. bunnies. Answer:",
            ["A", "B"],
            1,
        ),
        "boolq": (
            "Answer the question with only True or False: is water wet "
            "Context: Water makes things wet.",
            ["False", "True"],
            1,
        ),
    }
    for name, (prompt, choices, answer) in expected.items():
        splits = load_task(f"hub:{name}")
        assert splits.kind == "multiple-choice"
        for table in (splits.train, splits.test):
            assert table[0] == {"prompt": prompt, "choices": choices, "answer": answer}
            question = Question.from_record(table[0])
            assert question.prompt("text") == prompt
            assert question.completions("text") == [f" {choice}" for choice in choices]
    with pytest.raises(BaraError, match="cannot load allenai/winogrande:winogrande_m"):
        load_task("hub:winogrande_m")


def benchmark(tmp_path: Path, **options: object) -> Benchmark:
    values = {"model": "minilm", "tasks": ["bbc-news"], "methods": ["lora", "bara"]} | options
    path = tmp_path / "some.yaml"
    path.write_text(json.dumps(values))
    return Benchmark.load(path)


def test_keys_follow_what_decides_the_result(tmp_path: Path):
    cells = list(benchmark(tmp_path, seeds=[0, 1], ranks=[4, 8]).cells())
    assert len({cell.key for cell in cells}) == len(cells) == 8
    again = benchmark(tmp_path, name="other", methods=[{"name": "x", "method": "lora"}], seeds=[1])
    (shared,) = again.cells()
    same = next(c for c in cells if (c.method, c.seed, c.rank) == ("lora", 1, 8))
    assert shared.key == same.key
    assert (shared.name, shared.benchmark) == ("x", "other")
    changed = {
        c.key
        for options in ({"num_draws": 5}, {"epochs": [3]}, {"max_length": 32})
        for c in benchmark(tmp_path, **options).cells()
    }
    assert not changed & {cell.key for cell in cells}
    assert type(same).from_dict(json.loads(json.dumps(same.__dict__))) == same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": [0]}, "there is no 'seed'; did you mean 'seeds'"),
        ({"tasks": ["bbc-new"]}, "did you mean 'bbc-news'"),
        ({"methods": ["lara"]}, "did you mean 'lora'"),
        ({"methods": ["lora", "lora"]}, "two methods are named 'lora'"),
        ({"methods": [{"name": "x"}]}, "a mapping with `name` and `method`"),
        ({"methods": []}, "methods is empty"),
        ({"seeds": ["a"]}, "seeds must be a list of numbers"),
        ({"num_test": 0}, "num_test must be larger"),
        ({"corruptions": ["typos"]}, "did you mean 'typo'"),
        ({"severities": [6]}, "severities go from 1 to 5"),
        ({"ood": {"bbc-news": ["tweet"]}}, "tweet-sentiment"),
        ({"ood": {"tweets": ["bbc-news"]}}, "there is no 'tweets'"),
        ({"method_options": {"rr": 1}}, "there is no 'rr'"),
        ({"training": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"training": {"num_train_epochs": 3}}, "set `epochs`"),
        ({"methods": [{"name": 5, "method": "lora"}]}, "name must be text"),
        (
            {"methods": [{"name": "x", "method": "lora", "method_options": None}]},
            "method_options must be a mapping",
        ),
        (
            {"methods": [{"name": "x", "method": "lora", "training": "fast"}]},
            "training must be a mapping",
        ),
        ({"seeds": [0, 0]}, "without repetitions"),
        ({"seeds": [-1]}, "from 0 on"),
        ({"draws": [0]}, "above 0"),
        ({"train_sizes": [-5]}, "above 0"),
        ({"ranks": [0]}, "above 0"),
        ({"epochs": [-1]}, "above 0"),
        ({"name": "a/b"}, "no slashes"),
        ({"seeds": [2**32]}, "from 0 on, below 4294967296"),
        ({"num_draws": 10**9}, "at most 10000"),
        ({"draws": [10**9]}, "at most 10000"),
        ({"ranks": [10**9]}, r"method_options\.r must be at most 65536"),
        ({"seeds": list(range(200)), "train_sizes": list(range(1, 200))}, "cells are too many"),
    ],
)
def test_wrong_benchmarks_are_refused(tmp_path: Path, options, message):
    with pytest.raises(BaraError, match=message):
        benchmark(tmp_path, **options).check()


@pytest.mark.parametrize("epochs", [math.inf, math.nan])
def test_epochs_without_end_are_refused(epochs: float):
    with pytest.raises(BaraError, match="epochs must be a list of numbers above 0"):
        Benchmark("some", "minilm", ["bbc-news"], ["lora"], epochs=[epochs])


def test_pictures_of_a_longer_name_are_not_a_shorter_ones(tmp_path):
    for picture in ("few-cost.png", "few-texts-cost.png", "few-texts-nll.png"):
        (tmp_path / picture).touch()
    (tmp_path / "few.md").write_text("<!-- bench few -->\n<!-- /bench few -->\n")
    update_pages(tmp_path, {"few": [], "few-texts": []}, tmp_path)
    assert (tmp_path / "few.md").read_text().count(".png") == 1
    assert (tmp_path / "few-texts.md").read_text().count(".png") == 2
