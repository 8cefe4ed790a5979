"""`bara tune`: what is tried, that it goes on after a kill, and whether an adapter pays."""

import csv
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from datasets import ClassLabel, Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import bara
from bara.cli.tune import verdict
from bara.data.tables import load_table, table_digest
from bara.errors import BaraError
from bara.evaluation.metrics import measure
from bara.finetuning import runners, trials
from bara.finetuning import tune as tuning
from bara.finetuning.load import load_adapter
from bara.finetuning.search import (
    MAXIMISED,
    METRICS,
    OF_CLASSES,
    OF_ENTITIES,
    Score,
    _pooled,
    check_metric,
    paired_difference,
    search_space,
    split_tables,
)
from bara.finetuning.task_inputs import predict_table
from bara.finetuning.tune import tune
from bara.methods.recipe import TrainRecipe
from bara.methods.table import check_recipe
from bara.prediction.multi_label import MultiLabelPredictive
from bara.prediction.predictive import ClassificationPredictive, RegressionPredictive
from bara.prediction.words import TokenPredictive
from conftest import next_commands
from encoder_decoders import ending_tokenizer, tiny_seq2seq
from helpers import TinyNet, start_ray
from serving import TASK_TABLES
from test_methods import TABLE, base_dir  # noqa: F401  (a fixture)

optuna = pytest.importorskip("optuna")


def recipe_for(model, method="bara", **options):
    training = {"num_train_epochs": 4, "learning_rate": 0.01, "use_cpu": True}
    options = {"r": 2, "target_modules": ["query"]} | options
    return TrainRecipe(model=str(model), method=method, training=training, method_options=options)


def predictive(correct, n=40):
    """Right with this probability."""
    p = torch.full((n, 2), 1 - correct)
    p[:, 0] = correct
    return ClassificationPredictive(p.log()[None], torch.zeros(n).long())


def scored(predicted):
    return Score(bara.evaluation.metrics.measure(predicted).to_dict(), predicted)


@pytest.fixture
def quick(monkeypatch):
    """No training: the nearer a rate to 0.02 and a strength to 2, the better; the probe is 0.6."""
    seen = []

    def score(recipe, parts, *, num_draws, callbacks=(), after_part=None):
        seen.append(recipe)
        if recipe.method == "probe":
            return scored(predictive(0.6))
        rate = recipe.training["learning_rate"]
        strength = recipe.method_options["strength"]
        if rate > 0.03:
            raise BaraError("the loss is nan in step 1")
        off = abs(math.log(rate / 0.02)) + abs(math.log(strength / 2))
        return scored(predictive(0.9 * math.exp(-0.1 * off)))

    for module in (tuning, trials):
        monkeypatch.setattr(module, "held_out_score", score)
    return seen


def test_the_space_is_around_the_recipe():
    space = search_space(recipe_for("m"), {"epochs": (3, 5)})
    assert space == {"learning_rate": (0.001, 0.1), "epochs": (3, 5), "strength": (0.1, 10.0)}
    assert "strength" not in search_space(recipe_for("m", "lora"), {})
    assert "strength" not in search_space(recipe_for("m", "mc-dropout"), {})
    for method, given, message in (
        ("lora", {"strength": (1, 2)}, r"lora has no strength \(--strength\) to tune"),
        ("bara", {"epochs": (5, 3)}, "0 < low <= high"),
        ("bara+temperature", {}, r"tune without \+temperature"),
    ):
        with pytest.raises(BaraError, match=message):
            search_space(recipe_for("m", method), given)
    with pytest.raises(BaraError, match="no learning rate, epochs or strength"):
        search_space(TrainRecipe(model="m", method="probe"), {})


def test_epochs_that_a_number_of_steps_overrides_are_not_searched(tmp_path, quick):
    recipe = recipe_for("m").with_options({"training.max_steps": 3})
    assert set(search_space(recipe, {})) == {"learning_rate", "strength"}
    with pytest.raises(BaraError, match=r"training\.max_steps=3 is how long .*\(--epochs\)"):
        search_space(recipe, {"epochs": (1, 2)})
    assert "epochs" in search_space(recipe.with_options({"training.max_steps": -1}), {})
    tuned = tune(recipe, tmp_path, TABLE, num_trials=8)
    assert {r.training["num_train_epochs"] for r in quick[1:]} == {4}
    assert "epochs" not in tuned.best.choice
    saved = TrainRecipe.load(tmp_path / "recipe.yaml").training
    assert (saved["max_steps"], saved["num_train_epochs"]) == (3, 4)  # the recipe's own


def test_every_row_is_held_out_once_and_every_fold_knows_all_classes():
    rows = [{"text": str(i), "label": "rare" if i == 3 else "ab"[i % 2]} for i in range(20)]
    table = Dataset.from_list(rows)
    parts = split_tables(recipe_for("m"), table, None, 4)
    assert len(parts) == 4
    assert sorted(t for _, held in parts for t in held["text"]) == sorted(table["text"])
    for train, held in parts:
        assert set(train["text"]).isdisjoint(held["text"])
        assert train.features["label"].names == ["a", "b", "rare"]
    ((train, held),) = split_tables(recipe_for("m"), table, table.select(range(3)), 4)
    assert (len(train), len(held)) == (20, 3)
    with pytest.raises(BaraError, match=r"20 rows cannot be shared out among 21 folds \(--folds\)"):
        split_tables(recipe_for("m"), table, None, 21)


def test_classes_keep_their_share_in_the_folds():
    rows = [{"text": str(i), "label": "a" if i < 8 else "b"} for i in range(24)]
    for _, held in split_tables(recipe_for("m"), Dataset.from_list(rows), None, 4):
        assert sorted(held["label"]) == [0] * 2 + [1] * 4


def test_the_error_of_a_difference_is_that_of_a_paired_mean():
    generator = torch.Generator().manual_seed(0)
    n = 300
    labels = torch.zeros(n)
    means = torch.randn(2, n, generator=generator)
    means[1] = 0.9 * means[0] + 0.1 * means[1] + 0.2
    ours, theirs = (RegressionPredictive(m[None], torch.ones(1, n), labels) for m in means)
    difference, error = paired_difference(ours, theirs, "nll")
    losses = (means[0].square() - means[1].square()) / 2
    assert difference == pytest.approx(float(losses.mean()), rel=1e-4)
    assert error == pytest.approx(float(losses.std()) / n**0.5, rel=0.25)


def test_folds_of_questions_with_unequal_numbers_of_choices_are_pooled():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 4), (2, 3, 5), (2, 4, 3)]
    folds = [torch.randn(shape, generator=generator).log_softmax(-1) for shape in shapes]
    labels = [torch.zeros(shape[1]).long() for shape in shapes]
    parts = [ClassificationPredictive(*pair) for pair in zip(folds, labels, strict=True)]
    metrics = _pooled([scored(part) for part in parts]).metrics
    found = torch.cat([fold[..., 0].exp().mean(0) for fold in folds])
    assert metrics["nll"] == pytest.approx(-float(found.log().mean()), rel=1e-5)
    right = sum(measure(part).metrics["accuracy"] * len(part.labels) for part in parts)
    assert metrics["accuracy"] == pytest.approx(right / 13)


def test_a_search_finds_the_best_and_leaves_a_recipe_a_table_and_a_picture(tmp_path, quick):
    lines = []
    tuned = tune(recipe_for("m"), tmp_path, TABLE, num_trials=25, report=lines.append)
    assert quick[0].method == "probe"
    first = quick[1]
    assert first.training["learning_rate"] == 0.01
    assert first.training["num_train_epochs"] == 4
    assert first.method_options["strength"] == 1.0
    assert len(tuned.trials) == len(quick) - 1 == 25
    assert any(t.state == "failed" and "loss is nan" in t.error for t in tuned.trials)
    values = [t.value for t in tuned.trials if t.value is not None]
    assert tuned.best.value == min(values) < tuned.trials[0].value
    assert tuned.recipe.training["learning_rate"] == tuned.best.choice["learning_rate"]
    saved = TrainRecipe.load(tmp_path / "recipe.yaml")
    assert saved == tuned.recipe
    check_recipe(saved)
    with open(tmp_path / "trials.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["trial"] for row in table] == [str(t.number) for t in tuned.trials]
    assert float(table[tuned.best.number]["nll"]) == tuned.best.value
    assert (tmp_path / "trials.png").read_bytes().startswith(b"\x89PNG")
    assert lines[0].startswith("probe: nll 0.51")
    assert len(lines) == 26
    assert tuned.pays
    assert tuned.difference == pytest.approx(tuned.best.value + math.log(0.6), rel=1e-4)
    assert verdict(tuned, "nll").startswith("An adapter pays: nll ")


def test_a_metric_that_grows_is_maximised_and_a_draw_with_the_probe_pays_nothing(tmp_path, quick):
    tuned = tune(recipe_for("m"), tmp_path, TABLE, num_trials=4, metric="accuracy")
    assert tuned.best.value == max(t.value for t in tuned.trials if t.value is not None)
    assert (tuned.probe, tuned.difference, tuned.pays) == (1.0, 0.0, False)
    assert "does not clearly pay: accuracy 1.0000" in verdict(tuned, "accuracy")


def test_a_search_goes_on_and_runs_again_what_a_kill_cut_off(tmp_path, quick, monkeypatch):
    recipe = recipe_for("m")
    whole = tune(recipe, tmp_path / "whole", TABLE, num_trials=4)
    working = trials.held_out_score
    quick.clear()

    def killed(recipe, parts, **options):
        if len(quick) == 3:  # the probe and two trials
            raise KeyboardInterrupt
        return working(recipe, parts, **options)

    monkeypatch.setattr(trials, "held_out_score", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, tmp_path / "cut", TABLE, num_trials=4)
    monkeypatch.setattr(trials, "held_out_score", working)
    quick.clear()
    tuned = tune(recipe, tmp_path / "cut", TABLE, num_trials=4)
    assert len(quick) == 2  # and not the probe again
    assert len(tuned.trials) == 4
    choices = [t.choice for t in tuned.trials]
    assert choices[:3] == [t.choice for t in whole.trials][:3]
    quick.clear()
    assert tune(recipe, tmp_path / "cut", TABLE, num_trials=4).best == tuned.best
    assert quick == []
    with pytest.raises(BaraError, match="holds a search with another metric"):
        tune(recipe, tmp_path / "cut", TABLE, num_trials=5, metric="ece")
    with pytest.raises(BaraError, match="holds a search with another recipe"):
        tune(recipe_for("m", "lora"), tmp_path / "cut", TABLE, num_trials=5)


def test_a_search_does_not_go_on_with_another_table(tmp_path, quick):
    rows = TABLE.to_list()
    other = [*rows[:5], rows[5] | {"text": "a warm film"}, *rows[6:]]
    swapped = [row | {"label": rows[(i + 1) % len(rows)]["label"]} for i, row in enumerate(rows)]
    assert swapped != rows
    file = tmp_path / "train.csv"
    Dataset.from_list(rows).to_csv(file, index=False)
    recipe = recipe_for("m").with_options({"data": str(file)})

    def go_on(folder, *tables, **options):
        return tune(recipe, tmp_path / folder, *tables, num_trials=1, **options)

    go_on("folds", num_folds=2)
    seen = len(quick)
    go_on("folds", num_folds=2)  # the file is read again
    held_out = TABLE.select(range(4, 12))
    go_on("split", TABLE, held_out)
    go_on("split", Dataset.from_list(rows), Dataset.from_list(held_out.to_list()))
    assert len(quick) == 2 * seen
    for changed in (other, swapped, rows[::-1]):
        Dataset.from_list(changed).to_csv(file, index=False)
        with pytest.raises(BaraError, match=r"holds a search with another table: .*--output"):
            go_on("folds", num_folds=2)
    with pytest.raises(BaraError, match="another number of folds"):
        go_on("folds", num_folds=3)
    with pytest.raises(BaraError, match="another table"):
        go_on("split", TABLE, Dataset.from_list(other[4:12]))
    assert len(quick) == 2 * seen


def test_a_search_of_an_earlier_version_does_not_go_on(tmp_path, quick, monkeypatch):
    """It kept the numbers of rows alone: whether the tables are the same cannot be said."""
    now = trials.Search.settings

    def earlier(search):
        kept = {k: v for k, v in now(search).items() if k not in ("number of folds", "table")}
        return kept | {"rows": [[len(table) for table in part] for part in search.parts]}

    with monkeypatch.context() as patch:
        patch.setattr(trials.Search, "settings", earlier)
        tune(recipe_for("m"), tmp_path, TABLE, num_trials=1)
    seen = len(quick)
    with pytest.raises(BaraError, match=r"holds a search of another version of bara.*--output"):
        tune(recipe_for("m"), tmp_path, TABLE, num_trials=2)
    assert len(quick) == seen


def test_a_table_s_digest_is_that_of_its_content(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(2100)]
    table = Dataset.from_list(rows)
    table.to_csv(tmp_path / "t.csv", index=False)
    digest = table_digest(table)
    assert table_digest(load_table(tmp_path / "t.csv")) == digest
    assert table_digest(Dataset.from_list(rows[::-1]).select(range(2099, -1, -1))) == digest
    different = [
        table.select(range(2099)),
        table.rename_column("text", "sentence"),
        Dataset.from_list([*rows[:-1], rows[-1] | {"label": "a"}]),
        *(
            table.class_encode_column("label").cast_column("label", ClassLabel(names=names))
            for names in (["a", "b"], ["c", "d"])
        ),
    ]
    assert len({digest, *map(table_digest, different)}) == 6


def test_no_trial_that_succeeds_is_an_error_with_its_reason(tmp_path, quick):
    ranges = {"learning_rate": (0.1, 0.2)}
    with pytest.raises(BaraError, match=r"no trial was finished: the loss is nan"):
        tune(recipe_for("m"), tmp_path, TABLE, num_trials=2, ranges=ranges)


def test_the_command_trains_and_its_recipe_trains(base_dir, tmp_path, run):  # noqa: F811
    TABLE.to_csv(tmp_path / "t.csv", index=False)
    common = ["--set", "method_options.target_modules=[query]", "--set", "training.use_cpu=true"]
    printed = run(
        *("tune", "--model", base_dir, "--data", tmp_path / "t.csv"),
        *("--validation", tmp_path / "t.csv"),
        *("--method", "lora", "--trials", 2, "--output", tmp_path / "out"),
        *("--epochs", 1, 2, "--learning-rate", 1e-3, 1e-1, *common),
    )
    assert "an adapter" in printed.lower()
    assert "the probe's" in printed
    commands = next_commands(printed)
    assert len(commands) == 1 + ("does not clearly pay" in printed)
    assert commands[0][:3] == ["train", "--config", str(tmp_path / "out" / "recipe.yaml")]
    probe = ["train", "--config", str(tmp_path / "out" / "probe.yaml"), "--output", "my-probe"]
    assert commands[1:] in ([], [probe])
    for *command, folder in (commands[0], probe):
        run(*command, tmp_path / folder)
        assert (tmp_path / folder / "adapter_config.json").is_file()


def test_the_time_left_is_that_of_the_trials_to_come(tmp_path, quick, terminal):
    for trials_in_all in (2, 5):  # the second search goes on with the first
        tune(recipe_for("m"), tmp_path, TABLE, num_trials=trials_in_all)
        shown = terminal()
        assert re.search(rf"tuning: 100%.* {trials_in_all}/{trials_in_all} \[00:\d\d<00:00", shown)
    assert "tuning:  40%" in shown


def test_a_metric_is_refused_before_the_first_fit(tmp_path, task_folders):
    """What a task is said to have, its predictions are measured by."""
    for name, rows in TASK_TABLES.items():
        model, tokenizer, task = load_adapter(task_folders[name])
        table = Dataset.from_dict(rows)
        found = measure(predict_table(model, tokenizer, task, table, num_draws=1)).metrics
        assert set(METRICS.get(task.task, OF_CLASSES)) <= found.keys()
    scores = RegressionPredictive(torch.rand(1, 9), torch.ones(1, 9), torch.rand(9))
    assert set(METRICS["regression"]) <= measure(scores).metrics.keys()
    assert set(OF_CLASSES) <= measure(predictive(0.6)).metrics.keys()
    numbers = TABLE.remove_columns("label").add_column("label", [i / 7 for i in range(len(TABLE))])
    for table, metric in ((TABLE, "rmse"), (numbers, "accuracy")):  # there is no model "m"
        with pytest.raises(BaraError, match=rf"has the metrics .*not '{metric}' \(--metric\)"):
            tune(recipe_for("m"), tmp_path / metric, table, metric=metric)


def test_a_right_prediction_is_better_than_a_wrong_one_in_every_metric(task_folders):
    """Of several labels, answers and entities; in the direction that a search takes."""
    model, tokenizer, task = load_adapter(task_folders["answers"])
    table = Dataset.from_dict(TASK_TABLES["answers"])
    found = predict_table(model, tokenizer, task, table, num_draws=1)
    first = [answer.spans[0] for answer in found.answers]
    assert any(first)

    def with_references(spans):
        pairs = zip(found.passages, spans, strict=True)
        passages = [
            replace(p, answers=(s,) if s else (), texts=(p.text(s),) if s else ()) for p, s in pairs
        ]
        return replace(found, passages=tuple(passages))

    others = [
        answer.spans[1] if span is None else None
        for answer, span in zip(found.answers, first, strict=True)
    ]
    labels = torch.tensor([[1, 0], [0, 1], [1, 1]])
    logits = (8.0 * labels - 4)[None]
    tags = ("O", "B-x", "I-x")
    words = torch.tensor([0, 1, 2, 0])
    scores = (4 * torch.nn.functional.one_hot(words)).float().log_softmax(-1)

    def tagged(predicted):
        part = ClassificationPredictive(scores[predicted][None], words, tags)
        return TokenPredictive(part, torch.tensor([4]))

    right_and_wrong = {
        "question-answering": (with_references(first), with_references(others)),
        "multi-label": [MultiLabelPredictive(sign * logits, labels) for sign in (1, -1)],
        "token-classification": (tagged([0, 1, 2, 3]), tagged([1, 0, 0, 2])),
    }
    for task, pair in right_and_wrong.items():
        right, wrong = (measure(one).metrics for one in pair)
        names = METRICS.get(task, (*OF_CLASSES, *OF_ENTITIES))
        for name in set(names) - {"ece"}:
            assert (right[name] > wrong[name]) == (name in MAXIMISED), (task, name)
            assert right[name] != wrong[name]


def test_metrics_of_entities_are_for_tags_that_mark_them():
    recipe = recipe_for("m").with_options({"task": "token-classification"})
    for tags, known in ((["O", "B-x"], True), (["O", "B"], False)):
        table = Dataset.from_list([{"tokens": ["a", "b"], "tags": tags}] * 2)
        check_metric("accuracy", recipe, table)
        if known:
            check_metric("f1", recipe, table)
        else:
            with pytest.raises(BaraError, match=r"has the metrics nll, .*, not 'f1'"):
                check_metric("f1", recipe, table)


def test_an_encoder_decoder_is_tuned_by_its_likelihood(tmp_path):
    tiny_seq2seq("t5").save_pretrained(tmp_path / "t5")
    ending_tokenizer().save_pretrained(tmp_path / "t5")
    pairs = Dataset.from_list(
        [{"prompt": f"w{i}", "completion": f"w{i + 1}"} for i in range(4, 12)]
    )
    recipe = TrainRecipe(
        model=str(tmp_path / "t5"), task="seq2seq", method="lora", training={"save_strategy": "no"}
    )
    ranges = {"epochs": (1, 1), "learning_rate": (1e-3, 1e-3)}
    found = tune(recipe, tmp_path / "out", pairs, num_trials=1, num_folds=2, ranges=ranges)
    assert found.best.metrics["nll"] > 0


def test_folds_of_a_validation_table_are_refused(tmp_path, failing):
    command = ["tune", "--model", "m", "--data", "d.csv", "--validation", "v.csv", "--folds", 3]
    assert "--folds" in failing(*command, "--output", tmp_path / "out")


def test_trials_run_side_by_side(tmp_path, quick, monkeypatch):
    """Two threads in place of processes: each opens the journal and asks for its own trials."""
    monkeypatch.setattr(
        runners, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(max_workers=jobs)
    )
    tuned = tune(recipe_for("m"), tmp_path, TABLE, num_trials=8, jobs=2)
    assert [t.number for t in tuned.trials] == list(range(8))
    assert len({t.choice["learning_rate"] for t in tuned.trials}) == 8


def test_a_trial_runs_in_a_process_of_its_own(base_dir, tmp_path):  # noqa: F811
    options = {"num_trials": 1, "jobs": 2, "ranges": {"epochs": (1, 1)}}
    held_out = TABLE.select(range(8))
    tuned = tune(recipe_for(base_dir, "lora"), tmp_path / "out", TABLE, held_out, **options)
    assert [t.state for t in tuned.trials] == ["finished"]


def test_trials_run_on_ray(base_dir, tmp_path, monkeypatch):  # noqa: F811
    """With the same trials as in this process; a relative folder is this process's."""
    pytest.importorskip("ray")
    recipe = recipe_for(base_dir, "lora")
    options = {"num_trials": 2, "ranges": {"epochs": (1, 1)}}
    tables = (TABLE, TABLE.select(range(8)))
    here = tune(recipe, tmp_path / "here", *tables, **options)
    monkeypatch.chdir(tmp_path)
    with start_ray(num_cpus=1):
        there = tune(recipe, "there", *tables, executor="ray", **options)
        options["num_trials"] = 3
        monkeypatch.setattr(runners, "run_trial", lambda search, number: os._exit(1))
        with pytest.raises(BaraError, match=r"a trial was lost .*the same command goes on"):
            tune(recipe, "there", *tables, executor="ray", **options)
    assert [t.choice for t in there.trials] == [t.choice for t in here.trials]
    for one, other in zip(here.trials, there.trials, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4)
    with pytest.raises(BaraError, match="executor must be 'local' or 'ray'"):
        tune(recipe, "there", *tables, executor="slurm")


def test_a_killed_process_is_told_in_a_line(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(runners, "run_trial", end)
    with pytest.raises(BaraError, match=r"a trial was lost .*the same command goes on"):
        tune(recipe_for("m"), tmp_path, TABLE, num_trials=2, jobs=2)


def end(search, number):
    os._exit(1)


@pytest.mark.parametrize("option", ["--gpus", "--ray-address"])
def test_options_of_ray_are_refused_without_it(option, failing):
    command = ["tune", "--model", "m", "--data", "d.csv", option, "1"]
    assert f"{option} is for --executor ray" in failing(*command)
    assert f"{option} is for --executor ray" in failing("bench", "b.yaml", option, "1")


def test_hyperparameter_search_of_the_trainer(tmp_path):
    """With `model_init` every trial has a new adapter, and the callback tells each its N."""
    torch.manual_seed(0)
    rows = [{"x": torch.randn(6), "labels": torch.randn(5)} for _ in range(8)]
    made = []

    def model_init(trial=None):
        strength = trial.suggest_float("strength", 0.1, 10, log=True) if trial else 1.0
        config = bara.BaraConfig(r=2, strength=strength, target_modules=["layer"])
        made.append(get_peft_model(TinyNet(), config))
        return made[-1]

    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model_init=model_init,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[bara.BayesianCallback()],
    )
    best = trainer.hyperparameter_search(
        backend="optuna",
        n_trials=2,
        direction="minimize",
        hp_space=lambda trial: {
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)
        },
    )
    assert {"learning_rate", "strength"} == set(best.hyperparameters)
    numbers = [model.peft_config["default"].resolved for model in made[1:]]
    assert [n.num_observations for n in numbers] == [8, 8]
    assert best.hyperparameters["strength"] in [n.strength for n in numbers]
