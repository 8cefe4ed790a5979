"""`bara evaluate`: how good and how calibrated an adapter is on a labelled table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from bara.cli.options import (
    Adapter,
    BaseModel,
    BatchSize,
    GenerateOptions,
    MaxNewTokens,
    NumDraws,
    Seed,
    Split,
    probability,
)
from bara.schema import json_text

CONFORMAL_TASKS = ("classification", "regression", "multiple-choice", "image-classification")
"""What has prediction sets, or intervals."""


def evaluate(
    adapter: Adapter,
    data: Annotated[str, Option(help="Labelled table: a file or a hub data set.")],
    ood: Annotated[str | None, Option(help="Table of texts out of distribution.")] = None,
    split: Split = None,
    num_draws: NumDraws = 10,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    base_model: BaseModel = None,
    calibrate_risk: Annotated[
        float | None,
        Option(
            callback=probability,
            help="Also find the uncertainty above which to abstain, for this risk.",
        ),
    ] = None,
    calibrate_delta: Annotated[
        float | None,
        Option(
            callback=probability,
            help="Probability that the calibrated risk is not kept; 0.1 by default.",
        ),
    ] = None,
    calibrate_conformal: Annotated[
        bool,
        Option("--calibrate-conformal", help="Also calibrate the sets of `predict --coverage`."),
    ] = False,
    max_new_tokens: MaxNewTokens = None,
    generate_options: GenerateOptions = None,
    json_file: Annotated[
        Path | None, Option("--json", metavar="FILE", help="Write the numbers here too.")
    ] = None,
) -> None:
    """Print accuracy, likelihood, calibration and out-of-distribution detection.

    With --calibrate-risk, data that was not trained on gives the threshold for --abstain-at-risk.
    For a causal-lm or seq2seq adapter it holds for answers that are generated with the same
    --max-new-tokens and --set. With --calibrate-conformal it gives what `bara predict --coverage`
    needs.
    """
    from bara.adapter.inspection import against_frozen
    from bara.cli.generate import decoding_options
    from bara.cli.terminal import console, say_next, update_card
    from bara.data.images import IMAGE_TASK
    from bara.draws.draws import draw_source
    from bara.errors import BaraError
    from bara.evaluation.abstention import calibrate_threshold, save_threshold
    from bara.evaluation.conformal import calibrate_conformal as calibrate
    from bara.evaluation.conformal import save_conformal
    from bara.files import atomic_write_text
    from bara.finetuning.load import load_adapter, read_task
    from bara.finetuning.task_inputs import read_table
    from bara.language.tasks import GENERATING_TASKS
    from bara.machine import quieten_libraries

    quieten_libraries()
    task = read_task(adapter)
    _refuse(task, calibrate_risk, calibrate_delta, calibrate_conformal)
    table = read_table(data, task, split=split)
    ood_table = None if ood is None else read_table(ood, task)
    decoding = decoding_options(max_new_tokens, generate_options)
    model, tokenizer, task = load_adapter(adapter, base_model=base_model)
    generates = task.task in GENERATING_TASKS
    answers = generates and calibrate_risk is not None
    if decoding and not answers:
        raise BaraError(
            "--max-new-tokens and --set are for --calibrate-risk of a causal-lm or seq2seq "
            "adapter, which generates answers: leave them out"
        )
    draws = {"num_draws": num_draws, "seed": seed}
    metrics, by_label, selective = _evaluate(
        model, tokenizer, task, table, ood_table, {**draws, "batch_size": batch_size}, decoding
    )
    source = draw_source(model)
    drawn = None if source is None else source.num_draws(num_draws)
    inputs = "images" if task.task == IMAGE_TASK else "texts"
    caption = f"{len(table)} {inputs}, " + ("no draws" if drawn is None else f"{drawn} draws")
    console().print(_metric_view(f"{adapter} on {data}", caption, metrics))
    if by_label:
        console().print(_label_view(by_label))
    if "nll" in metrics and (verdict := against_frozen(model, metrics["nll"])) is not None:
        console().print(verdict, soft_wrap=True)
    update_card(adapter, metrics=metrics, num_draws=drawn, data=data)
    chat = "messages" in table.column_names
    if calibrate_risk is not None:
        measure: dict[str, Any] = {"measure": "predictions"}
        if answers:
            measure = {"measure": "answers", "chat": chat, "decoding": decoding}
        threshold = calibrate_threshold(
            selective(), risk=calibrate_risk, delta=calibrate_delta or 0.1
        )
        save_threshold(adapter, threshold, **draws, **measure)
        print(_threshold_line(threshold, calibrate_risk))
    if calibrate_conformal:
        save_conformal(adapter, calibrate(selective()), **draws)
        print(f"Prediction sets or intervals are calibrated by {len(table)} {inputs}.")
    if json_file is not None:
        content: dict[str, Any] = {"adapter": str(adapter), "data": data, "ood": ood}
        content |= {"num_texts": len(table), "num_draws": drawn, "seed": seed, "metrics": metrics}
        content |= {} if by_label is None else {"by_label": by_label}
        atomic_write_text(json_file, json_text(content, indent=2) + "\n")
    use: list[object] = ["bara", "generate" if generates else "predict", adapter]
    use += ["PROMPT"] if generates else ["--data", "TABLE"]
    if calibrate_risk is not None:
        use += ["--abstain-at-risk", f"{calibrate_risk:g}"]
    if calibrate_conformal:
        use += ["--coverage", 0.9]
    if calibrate_risk is not None or calibrate_conformal:  # it holds for the same draws
        use += ["--num-draws", num_draws, "--seed", seed]
    if answers:  # and the same decoding
        use += ["--chat"] if chat else []
        use += [] if max_new_tokens is None else ["--max-new-tokens", max_new_tokens]
        use += [word for option in generate_options or [] for word in ("--set", option)]
    say_next(use)


def _refuse(task: Any, risk: float | None, delta: float | None, conformal: bool) -> None:
    """Refuses a calibration that the task has not, before anything is read or loaded."""
    from bara.errors import BaraError

    if delta is not None and risk is None:
        raise BaraError("--calibrate-delta is of --calibrate-risk: give that too, or leave it out")
    if risk is not None and task.task == "regression":
        raise BaraError(
            "--calibrate-risk is not for regression, which has no errors to count: leave it out"
        )
    if conformal and task.task not in CONFORMAL_TASKS:
        raise BaraError(
            f"--calibrate-conformal is for {', '.join(CONFORMAL_TASKS)}, and this adapter for "
            f"{task.task}: leave it out"
        )


def _threshold_line(threshold: Any, risk: float) -> str:
    """What was calibrated, in words."""
    if threshold.uncertainty is None:
        return f"No threshold keeps the risk at {risk:g}: abstaining always."
    return (
        f"Abstaining above the uncertainty {threshold.uncertainty:.4f} keeps the risk at "
        f"{risk:g}; {threshold.coverage:.0%} of these are answered."
    )


def _evaluate(
    model: Any,
    tokenizer: Any,
    task: Any,
    table: Any,
    ood: Any,
    options: dict[str, Any],
    decoding: dict[str, Any],
) -> tuple[dict[str, float], dict[str, dict[str, float]] | None, Callable[[], Any]]:
    """The metrics of a task, those of each label where there are such, and what
    `calibrate_threshold` needs, computed when it is called."""
    from bara.errors import BaraError
    from bara.evaluation.metrics import measure
    from bara.finetuning.task_inputs import predict_table
    from bara.language.evaluation import answer_losses, token_metrics
    from bara.language.tasks import GENERATING_TASKS, LanguageTask

    if task.task in GENERATING_TASKS:
        if ood is not None:
            raise BaraError("--ood is for classification and multiple choice: leave it out")
        metrics = token_metrics(model, task.inputs(table, tokenizer), **options)
        return metrics, None, lambda: answer_losses(model, tokenizer, table, **options, **decoding)
    if ood is not None and not isinstance(task, LanguageTask) and task.task != "classification":
        raise BaraError("--ood is for classification and multiple choice: leave it out")
    predictive = predict_table(model, tokenizer, task, table, **options)
    elsewhere = None
    if ood is not None:
        elsewhere = predict_table(model, tokenizer, task, ood, labels=False, **options)
    evaluation = measure(predictive, elsewhere)
    return evaluation.to_dict(), evaluation.by_label, lambda: predictive


def _metric_view(title: str, caption: str, metrics: dict[str, float]) -> Any:
    """A table with a row for each metric."""
    from rich.table import Table

    view = Table(title=title, caption=caption)
    view.add_column("metric")
    view.add_column("value", justify="right")
    for name, value in metrics.items():
        view.add_row(name, f"{value:.4f}")
    return view


def _label_view(by_label: dict[str, dict[str, float]]) -> Any:
    """A table with a row for each label."""
    from rich.table import Table

    view = Table()
    view.add_column("label")
    for name in next(iter(by_label.values())):
        view.add_column(name, justify="right")
    for name, scores in by_label.items():
        view.add_row(name, *(f"{value:.4g}" for value in scores.values()))
    return view
