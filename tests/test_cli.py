"""The commands end to end on a tiny model, and one clear line for everything that goes wrong."""

from __future__ import annotations

import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    TrainerCallback,
)

from bara import BaraError
from bara.data.tables import load_table
from bara.finetuning.checkpoints import newest_checkpoint
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.methods.recipe import TrainRecipe
from bara.prediction.predict import predict
from conftest import tiny_bert_config, write_jsonl

GOOD = ("good", "great", "fine", "warm")
BAD = ("bad", "awful", "poor", "cold")
NOUNS = ("film", "plot", "food")


def sentences() -> list[dict[str, object]]:
    return [
        {"text": f"the {noun} is {word}", "label": label, "score": score + 0.25 * i}
        for label, words, score in (("pos", GOOD, 5.0), ("neg", BAD, 1.0))
        for i, word in enumerate(words)
        for noun in NOUNS
    ]


def base_and_table(folder: Path, tokenizer: BertTokenizerFast) -> Path:
    """Writes a tiny base model into the folder `base`, and a table beside it; returns the table."""
    torch.manual_seed(0)
    BertForSequenceClassification(tiny_bert_config()).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return write_jsonl(folder / "table.jsonl", sentences())


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "table.jsonl", sentences())


@pytest.fixture
def trained(tmp_path: Path, tiny_model_dir: Path, table: Path) -> Path:
    """An adapter that was trained for a moment."""
    recipe = TrainRecipe(
        model=str(tiny_model_dir),
        data=str(table),
        output=str(tmp_path / "adapter"),
        training={"num_train_epochs": 1},
    )
    return finetune(recipe)


def train_arguments(model: Path, table: Path, output: Path, *more: object) -> list[object]:
    given = ["train", "--model", model, "--data", table, "--output", output]
    return [*given, "--epochs", 1, *more]


FIT = ["--epochs", 20, "--batch-size", 8, "--learning-rate", 0.02]
"""Options that fit the few sentences well, but for the prior."""

# --- what works ---


@pytest.mark.parametrize("method", ["lora", "bara", "balora"])
def test_train_learns_and_evaluate_and_predict_agree(
    tmp_path: Path, tiny_model_dir: Path, table: Path, run: Callable[..., str], method: str
) -> None:
    output = tmp_path / "out"
    # A random encoder learns late: until then the prior would close every gate, and noise hide it.
    calm = "kl_weight: 0, local_kl_weight: 0, "
    calm += "factor_noise: false, weight_noise: 0" if method == "bara" else "init_noise: 0.05"
    gentle = ["--set", f"method_options={{{calm}}}"]
    options = [
        "--method",
        method,
        *([] if method == "lora" else gentle),
        *FIT,
        "--validation",
        table,
    ]
    printed = run(*train_arguments(tiny_model_dir, table, output, *options))
    assert f"bara evaluate {output}" in printed

    numbers = tmp_path / "numbers.json"
    shown = run("evaluate", output, "--data", table, "--ood", table, "--json", numbers)
    metrics = json.loads(numbers.read_text())["metrics"]
    assert metrics["accuracy"] == 1.0
    assert metrics["nll"] < math.log(2) / 2
    assert metrics["ood_auroc"] == pytest.approx(0.5)
    assert f"{metrics['nll']:.4f}" in shown
    saved = json.loads((output / "adapter_config.json").read_text()).get("resolved") or {}
    frozen = saved.get("frozen_nll")  # only BaRA's default looks
    assert (method == "bara") == (frozen is not None)
    if frozen is not None:
        assert f"a linear head on the frozen model had an nll of {frozen:.4f}" in shown.lower()
        assert ("rank 0 is enough" in shown) == (metrics["nll"] >= frozen)

    lines = run("predict", output, "--data", table).splitlines()
    records = [json.loads(line) for line in lines]
    rows = sentences()
    assert [record["prediction"] for record in records] == [row["label"] for row in rows]
    true = [r["probabilities"][row["label"]] for r, row in zip(records, rows, strict=True)]
    nll = -sum(math.log(p) for p in true) / len(true)
    assert nll == pytest.approx(metrics["nll"], rel=1e-5, abs=1e-7)  # 1 - p is rounded


@pytest.mark.parametrize(
    ("frozen", "verdict"), [(0.0, "rank 0 is enough"), (99.0, "better if it was not trained on")]
)
def test_ranks_say_whether_the_frozen_model_would_do(
    tmp_path: Path, trained: Path, table: Path, run: Callable[..., str], frozen: float, verdict: str
) -> None:
    config = json.loads((trained / "adapter_config.json").read_text())
    config["resolved"]["frozen_nll"] = frozen
    (trained / "adapter_config.json").write_text(json.dumps(config))
    shown = run("ranks", trained, "--data", table, "--output", tmp_path / "ranks")
    assert verdict in shown
    assert verdict in json.loads((tmp_path / "ranks" / "ranks.json").read_text())["frozen"]


def test_regression_predicts_in_the_units_of_the_data(
    tmp_path: Path, tiny_model_dir: Path, table: Path, run: Callable[..., str]
) -> None:
    output = tmp_path / "out"
    options = ["--label-column", "score", "--method", "lora", *FIT]
    run(*train_arguments(tiny_model_dir, table, output, *options))
    run("evaluate", output, "--data", table, "--json", tmp_path / "numbers.json")
    metrics = json.loads((tmp_path / "numbers.json").read_text())["metrics"]
    scores = torch.tensor([row["score"] for row in sentences()])
    assert metrics["rmse"] < 0.5 * scores.std(correction=0).item()
    records = map(json.loads, run("predict", output, "--data", table).splitlines())
    predictions = torch.tensor([record["prediction"] for record in records])
    rmse = (predictions - scores).square().mean().sqrt().item()
    assert rmse == pytest.approx(metrics["rmse"], rel=1e-4)


def test_text_pairs(
    tmp_path: Path, tiny_model_dir: Path, run: Callable[..., str], failing: Callable[..., str]
) -> None:
    rows = [
        {"a": f"the {noun}", "b": f"was {word}", "y": word in GOOD}
        for word in (*GOOD, *BAD)
        for noun in NOUNS
    ]
    table = write_jsonl(tmp_path / "pairs.jsonl", rows)
    columns = ["--text-column", "a", "--text-pair-column", "b", "--label-column", "y"]
    run(*train_arguments(tiny_model_dir, table, tmp_path / "out", *columns))
    first = json.loads(run("predict", tmp_path / "out", "--data", table).splitlines()[0])
    assert set(first["probabilities"]) == {"true", "false"}
    alone = write_jsonl(tmp_path / "alone.jsonl", [{"a": "the film"}])
    assert "no column 'b'" in failing("predict", tmp_path / "out", "--data", alone)


def test_recipe_file_gives_the_same_adapter_and_flags_go_before_it(
    tmp_path: Path, tiny_model_dir: Path, table: Path, run: Callable[..., str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--method", "lora", "-r", 4, "--set", "training.weight_decay=1e-2"]
    run(*train_arguments(tiny_model_dir, table, first, *options, "--save-config", recipe))
    run("train", "--config", recipe, "--output", second)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    shown = run("train", "--config", recipe, "-r", 2, "--dry-run")
    assert "r: 2" in shown
    assert "weight_decay: 0.01" in shown


def test_saved_adapter_predicts_the_same_in_another_process(trained: Path, table: Path) -> None:
    model, tokenizer, task = load_adapter(trained)
    inputs = task.inputs(load_table(table), tokenizer, labels=False)
    here = predict(model, inputs, num_draws=4, seed=3).probs
    command = [sys.executable, "-m", "bara", "predict", trained, "--num-draws", 4, "--seed", 3]
    there = subprocess.run(
        [str(part) for part in command],
        input=table.read_text(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stderr == ""
    records = [json.loads(line) for line in there.stdout.splitlines()]
    probabilities = torch.tensor([list(record["probabilities"].values()) for record in records])
    torch.testing.assert_close(probabilities, here, rtol=0, atol=1e-6)


def test_modules_without_pretrained_weights_come_back(
    tmp_path: Path, tiny_bert: BertForSequenceClassification, tiny_tokenizer, table: Path
) -> None:
    """A checkpoint without a pooler gets a random one, which has to be saved with the adapter."""
    folder = tmp_path / "encoder"
    state = tiny_bert.bert.state_dict()
    tiny_bert.bert.save_pretrained(
        folder, state_dict={k: v for k, v in state.items() if "pooler" not in k}
    )
    tiny_tokenizer.save_pretrained(folder)
    recipe = TrainRecipe(
        model=str(folder),
        data=str(table),
        output=str(tmp_path / "out"),
        training={"num_train_epochs": 1},
    )
    finetune(recipe)
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, tokenizer, task = load_adapter(tmp_path / "out")
        inputs = task.inputs(load_table(table), tokenizer)
        outputs.append(predict(model, inputs, num_draws=2).probs)
    assert torch.equal(*outputs)


def test_resumed_training_ends_where_uninterrupted_training_does(
    tmp_path: Path,
    tiny_model_dir: Path,
    table: Path,
    run: Callable[..., str],
    failing: Callable[..., str],
) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 8:
                raise KeyboardInterrupt

    def recipe(name: str) -> TrainRecipe:
        training = {"num_train_epochs": 4, "per_device_train_batch_size": 8}
        return TrainRecipe(
            model=str(tiny_model_dir),
            data=str(table),
            output=str(tmp_path / name),
            training=training,
        )

    whole = finetune(recipe("whole"))
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe("parts"), callbacks=[Stop()])
    parts = tmp_path / "parts"
    assert not (parts / "adapter_config.json").exists()
    # What a process leaves that is killed while it saves is no checkpoint.
    shutil.copytree(parts / "checkpoints/checkpoint-6", parts / "checkpoints/checkpoint-9")
    (parts / "checkpoints/checkpoint-9/complete").unlink()
    assert "method_options" in failing("train", "--resume", "--output", parts, "-r", 4)
    resume = ["train", "--resume", "--output", parts]
    assert "label_column" in failing(*resume, "--label-column", "score")
    others = [{**row, "label": f"very {row['label']}"} for row in sentences()]
    other = write_jsonl(tmp_path / "other.jsonl", others)
    assert "label_names = ('neg', 'pos')" in failing(*resume, "--data", other)
    assert "no run to resume" in failing("train", "--resume", "--output", tmp_path / "nowhere")
    run("train", "--resume", "--output", parts)
    expected = load_file(whole / "adapter_model.safetensors")
    resumed = load_file(parts / "adapter_model.safetensors")
    for key, tensor in expected.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=0, atol=1e-6)


def test_a_new_training_leaves_nothing_of_the_earlier_one_that_is_read(
    trained: Path,
    tiny_model_dir: Path,
    table: Path,
    run: Callable[..., str],
    failing: Callable[..., str],
) -> None:
    again = train_arguments(tiny_model_dir, table, trained, "--overwrite")
    run("evaluate", trained, "--data", table, "--calibrate-conformal")
    run("predict", trained, "--data", table, "--coverage", 0.8)
    run(*again, "--seed", 1)
    assert "no conformal calibration" in failing(
        "predict", trained, "--data", table, "--coverage", 0.8
    )
    # transformers would put an adapter that is still there on the base model
    run(*again, "--method", "full")
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    run(*again)
    assert not (trained / "model.safetensors").exists()


def test_predict_streams_in_a_pipe(trained: Path) -> None:
    """The first answers come while the input is still open."""
    command = [sys.executable, "-m", "bara", "predict", str(trained)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write('{"text": "good film"}\n' * 64)
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["prediction"] in ("pos", "neg")
        process.stdout.close()
        process.stdin.write('{"text": "good film"}\n' * 640)
        process.stdin.close()
        assert process.stderr.read() == "bara: error: the reader of the output closed the pipe\n"
    assert process.returncode == 1


def test_predict_writes_a_file_whole_or_not_at_all(
    tmp_path: Path, trained: Path, run: Callable[..., str], failing: Callable[..., str]
) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "good film"}] * 70)
    output = tmp_path / "predictions.jsonl"
    assert str(output) in run("predict", trained, "--data", texts, "--output", output)
    before = output.read_text()
    assert before.count("\n") == 70
    texts.write_text(texts.read_text() + '{"text": ""}\n')
    assert "row 71" in failing("predict", trained, "--data", texts, "--output", output)
    assert output.read_text() == before


# --- what goes wrong ---


def test_wrong_command_lines(failing: Callable[..., str], trained: Path, table: Path) -> None:
    assert "--dat" in failing("predict", trained, "--dat", table)
    assert "No such command" in failing("trian")
    assert "num-draws" in failing("evaluate", trained, "--data", table, "--num-draws", 0)
    assert "which model?" in failing("train", "--data", table)
    assert "which data?" in failing("train", "--model", "x")
    assert "NAME=VALUE" in failing("train", "--set", "seed")
    for command in ("predict", "evaluate"):
        wrong = failing(command, trained, "--data", table, "--split", "test")
        assert "leave out the split 'test'" in wrong


def test_bad_data(
    tmp_path: Path, tiny_model_dir: Path, trained: Path, failing: Callable[..., str]
) -> None:
    def fails(rows: list[dict[str, object]], *options: object) -> str:
        data = write_jsonl(tmp_path / "bad.jsonl", rows)
        return failing(*train_arguments(tiny_model_dir, data, tmp_path / "out", *options))

    rows = sentences()
    assert "the columns are 'text', 'label', 'score'" in fails(rows, "--text-column", "body")
    assert "is empty" in fails([])
    assert "two or more" in fails(rows[:3])
    rows[4] = {**rows[4], "score": math.nan}
    assert "NaN or infinite in row 5" in fails(rows, "--label-column", "score")
    rows[5] = {**rows[5], "text": None}
    assert "row 6" in fails(rows)
    assert not (tmp_path / "out").exists()
    unseen = write_jsonl(tmp_path / "unseen.jsonl", [{"text": "good film", "label": "meh"}])
    assert "not in the training data: 'meh'" in failing("evaluate", trained, "--data", unseen)
    assert "there is no file" in failing("evaluate", trained, "--data", tmp_path / "no.csv")


def test_bad_options(
    tmp_path: Path, tiny_model_dir: Path, table: Path, failing: Callable[..., str]
) -> None:
    def fails(*options: object) -> str:
        return failing(*train_arguments(tiny_model_dir, table, tmp_path / "out", *options))

    assert "--rank must be at least 1" in fails("-r", 0)
    assert "--rank must be at least 1" in fails("-r", 0, "--method", "lora")
    assert "No modules" in fails("--set", "method_options.target_modules=[nowhere]")
    for unmatched in (
        *("target_modules=[query, nowhere]", "modules_to_save=[nowhere]"),
        *("exclude_modules=[nowhere]", "rank_pattern={nowhere: 2}", "alpha_pattern={nowhere: 2}"),
    ):
        option = f"method_options.{unmatched}"
        assert re.search(rf"{option.partition('=')[0]}: .*'nowhere'", fails("--set", option))
    assert "did you mean 'learning_rate'" in fails("--set", "training.learning_rat=1")
    assert "--max-length" in fails("--max-length", 0)
    assert "no complete checkpoint" in fails("--resume")
    assert "cannot load the base model" in failing(
        *train_arguments(tmp_path, table, tmp_path / "out")
    )


def test_options_without_effect_are_refused_before_the_work(
    trained: Path, table: Path, failing: Callable[..., str]
) -> None:
    evaluate = ["evaluate", trained, "--data", table]
    assert "--calibrate-risk" in failing(*evaluate, "--calibrate-delta", 0.2)
    task = json.loads((trained / "text_task.json").read_text())
    for kind, option in (
        ("regression", ("--calibrate-risk", 0.1)),
        ("multi-label", ("--calibrate-conformal",)),
    ):
        (trained / "text_task.json").write_text(json.dumps({**task, "task": kind}))
        assert option[0] in failing(*evaluate, *option)
        assert "abstention.json" not in {path.name for path in trained.iterdir()}


def test_damaged_adapters(trained: Path, table: Path, failing: Callable[..., str]) -> None:
    weights = trained / "adapter_model.safetensors"
    whole = weights.read_bytes()

    def fails() -> str:
        return failing("evaluate", trained, "--data", table)

    weights.write_bytes(whole[: len(whole) // 2])
    assert "cut off or damaged" in fails()
    weights.write_bytes(b"\xff" * 100)
    assert "cut off or damaged" in fails()
    weights.rename(trained / "adapter_model.bin")
    assert "is a pickle" in fails()
    (trained / "adapter_model.bin").unlink()
    assert "has no adapter_model.safetensors" in fails()
    weights.write_bytes(whole)
    for name in ("adapter_config.json", "text_task.json", "recipe.yaml"):
        content = (trained / name).read_text()
        (trained / name).write_text(content[: len(content) // 2] + "\n{[")
        assert name in fails()
        (trained / name).unlink()
        assert name in fails()
        (trained / name).write_text(content)
    assert "no adapter folder" in failing("evaluate", trained / "no", "--data", table)


def test_adapter_of_another_base_model(
    tmp_path: Path, trained: Path, table: Path, tiny_tokenizer, failing: Callable[..., str]
) -> None:
    def base(name: str, **changes: int) -> Path:
        config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = BertConfig(vocab_size=40, intermediate_size=64, **{**config, **changes})
        BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        return tmp_path / name

    def fails(model: object) -> str:
        return failing("evaluate", trained, "--data", table, "--base-model", model)

    assert "has the shape" in fails(base("wider", hidden_size=64))
    assert "not in it" in fails(base("deeper", num_hidden_layers=3))
    assert "have no place there" in fails(base("flatter", num_hidden_layers=1))
    assert "cannot load the base model" in fails(tmp_path / "gone")


def test_extra_tensors_in_an_adapter_are_refused(
    trained: Path, table: Path, failing: Callable[..., str]
) -> None:
    path = trained / "adapter_model.safetensors"
    save_file({**load_file(path), "stray": torch.zeros(1)}, path)
    assert "first: stray" in failing("evaluate", trained, "--data", table)


@pytest.mark.parametrize("method", ["lora", "bara"])
def test_loss_that_is_not_finite_keeps_the_good_adapter(
    trained: Path, tiny_model_dir: Path, table: Path, failing: Callable[..., str], method: str
) -> None:
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    arguments = train_arguments(tiny_model_dir, table, trained, "--method", method)
    assert "--overwrite" in failing(*arguments)
    options = ["--overwrite", "--learning-rate", "1e38", "--epochs", 9]
    assert "(--learning-rate)" in failing(*arguments, *options)
    assert before == {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, tiny_model_dir: Path, table: Path
) -> None:
    class Spoil(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            next(p for p in kwargs["model"].parameters() if p.requires_grad).data.fill_(math.nan)

    recipe = TrainRecipe(
        model=str(tiny_model_dir),
        data=str(table),
        output=str(tmp_path / "out"),
        training={"num_train_epochs": 1},
    )
    with pytest.raises(BaraError, match=r"not finite after training.*\(--learning-rate\)"):
        finetune(recipe, callbacks=[Spoil()])
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.fixture
def small_files_only() -> Callable[[int], None]:
    """Make the system refuse to write files beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_previous_checkpoint_survives_a_full_disk(
    tmp_path: Path, tiny_model_dir: Path, table: Path, small_files_only: Callable[[int], None]
) -> None:
    class FillDisk(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                small_files_only(4096)

    recipe = TrainRecipe(
        model=str(tiny_model_dir),
        data=str(table),
        output=str(tmp_path / "out"),
        training={"num_train_epochs": 3, "per_device_train_batch_size": 8},
    )
    with pytest.raises(BaraError, match=r"cannot save the checkpoint .*checkpoint-6") as caught:
        finetune(recipe, callbacks=[FillDisk()])
    assert "\n" not in str(caught.value)
    checkpoints = tmp_path / "out" / "checkpoints"
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-3"
    assert not (checkpoints / "checkpoint-6").exists()


def test_full_disk_at_the_end_keeps_the_good_adapter(
    trained: Path,
    tiny_model_dir: Path,
    table: Path,
    failing: Callable[..., str],
    small_files_only: Callable[[int], None],
) -> None:
    before = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    small_files_only(4096)
    never = ["--overwrite", "--set", "training.save_strategy=no"]
    assert "cannot write" in failing(*train_arguments(tiny_model_dir, table, trained, *never))
    assert before == {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}


def test_interrupt_is_one_line(
    trained: Path, table: Path, failing: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bara.finetuning.task_inputs.predict", interrupt)
    assert failing("predict", trained, "--data", table) == "bara: error: interrupted\n"


def test_unreadable_output_place(trained: Path, table: Path, failing: Callable[..., str]) -> None:
    line = failing("predict", trained, "--data", table, "--output", trained / "recipe.yaml" / "x")
    assert "cannot write" in line
