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
    from rich.table import Table

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
    if calibrate_delta is not None and calibrate_risk is None:
        raise BaraError("--calibrate-delta is of --calibrate-risk: give that too, or leave it out")
    if calibrate_risk is not None and task.task == "regression":
        raise BaraError(
            "--calibrate-risk is not for regression, which has no errors to count: leave it out"
        )
    if calibrate_conformal and task.task not in CONFORMAL_TASKS:
        raise BaraError(
            f"--calibrate-conformal is for {', '.join(CONFORMAL_TASKS)}, and this adapter for "
            f"{task.task}: leave it out"
        )
    table = read_table(data, task, split=split)
    ood_table = None if ood is None else read_table(ood, task)
    decoding = decoding_options(max_new_tokens, generate_options)
    model, tokenizer, task = load_adapter(adapter, base_model=base_model)
    answers = task.task in GENERATING_TASKS and calibrate_risk is not None
    if decoding and not answers:
        raise BaraError(
            "--max-new-tokens and --set are for --calibrate-risk of a causal-lm or seq2seq "
            "adapter, which generates answers: leave them out"
        )
    options = {"num_draws": num_draws, "seed": seed, "batch_size": batch_size}
    metrics, by_label, selective = _evaluate(
        model, tokenizer, task, table, ood_table, options, decoding
    )
    source = draw_source(model)
    drawn = None if source is None else source.num_draws(num_draws)
    inputs = "images" if task.task == IMAGE_TASK else "texts"
    caption = f"{len(table)} {inputs}, " + ("no draws" if drawn is None else f"{drawn} draws")
    view = Table(title=f"{adapter} on {data}", caption=caption)
    view.add_column("metric")
    view.add_column("value", justify="right")
    for name, value in metrics.items():
        view.add_row(name, f"{value:.4f}")
    console().print(view)
    if by_label:
        console().print(_label_view(by_label))
    if "nll" in metrics and (verdict := against_frozen(model, metrics["nll"])) is not None:
        console().print(verdict, soft_wrap=True)
    update_card(adapter, metrics=metrics, num_draws=drawn, data=data)
    if calibrate_risk is not None:
        threshold = calibrate_threshold(
            selective(), risk=calibrate_risk, delta=calibrate_delta or 0.1
        )
        conditions: dict[str, Any] = {"num_draws": num_draws, "seed": seed}
        if answers:
            chat = "messages" in table.column_names
            conditions |= {"measure": "answers", "chat": chat, "decoding": decoding}
        else:
            conditions |= {"measure": "predictions"}
        save_threshold(adapter, threshold, **conditions)
        if threshold.uncertainty is None:
            print(f"No threshold keeps the risk at {calibrate_risk:g}: abstaining always.")
        else:
            print(
                f"Abstaining above the uncertainty {threshold.uncertainty:.4f} keeps the risk at "
                f"{calibrate_risk:g}; {threshold.coverage:.0%} of these are answered."
            )
    if calibrate_conformal:
        save_conformal(adapter, calibrate(selective()), num_draws=num_draws, seed=seed)
        print(f"Prediction sets or intervals are calibrated by {len(table)} {inputs}.")
    if json_file is not None:
        content: dict[str, Any] = {
            "adapter": str(adapter),
            "data": data,
            "ood": ood,
            "num_texts": len(table),
            "num_draws": drawn,
            "seed": seed,
            "metrics": metrics,
        }
        if by_label is not None:
            content["by_label"] = by_label
        atomic_write_text(json_file, json_text(content, indent=2) + "\n")
    language = task.task in GENERATING_TASKS
    use = ["generate", adapter, "PROMPT"] if language else ["predict", adapter, "--data", "TABLE"]
    if calibrate_risk is not None:
        use += ["--abstain-at-risk", f"{calibrate_risk:g}"]
    if calibrate_conformal:
        use += ["--coverage", 0.9]
    if calibrate_risk is not None or calibrate_conformal:  # it holds for the same draws
        use += ["--num-draws", num_draws, "--seed", seed]
    if answers:  # and the same decoding
        use += ["--chat"] if "messages" in table.column_names else []
        use += [] if max_new_tokens is None else ["--max-new-tokens", max_new_tokens]
        use += [word for option in generate_options or [] for word in ("--set", option)]
    say_next(["bara", *use])


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
    from bara.finetuning.task_inputs import model_inputs, predict_table
    from bara.language.evaluation import answer_losses, token_metrics
    from bara.language.tasks import GENERATING_TASKS, LanguageTask

    if task.task in GENERATING_TASKS:
        if ood is not None:
            raise BaraError("--ood is for classification and multiple choice: leave it out")
        metrics = token_metrics(model, model_inputs(table, tokenizer, task), **options)
        return metrics, None, lambda: answer_losses(model, tokenizer, table, **options, **decoding)
    if ood is not None and not isinstance(task, LanguageTask) and task.task != "classification":
        raise BaraError("--ood is for classification and multiple choice: leave it out")
    predictive = predict_table(model, tokenizer, task, table, **options)
    elsewhere = None
    if ood is not None:
        elsewhere = predict_table(model, tokenizer, task, ood, labels=False, **options)
    evaluation = measure(predictive, elsewhere)
    return evaluation.to_dict(), evaluation.by_label, lambda: predictive


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
