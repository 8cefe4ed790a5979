"""`bara review`: what a person should look at first, and how good the rest then is."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Option

from bara.cli.options import AbstainAtRisk, Adapter, BaseModel, BatchSize, NumDraws, Seed, Split

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Of the rows, for which the expected error rate of the others is printed."""
REVIEWED_TASKS = ("classification", "multiple-choice", "image-classification")


def review(
    adapter: Adapter,
    data: Annotated[str, Option(help="Table of texts; labels are not used.")],
    output: Annotated[
        str, Option(help="JSONL or CSV file; - writes JSONL to standard output.")
    ] = "review.csv",
    split: Split = None,
    num_draws: NumDraws = 10,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    abstain_at_risk: AbstainAtRisk = None,
    base_model: BaseModel = None,
) -> None:
    """Sort predictions for a person to look at, the most uncertain first.

    Every row has the expected error rate of the rows after it. It follows from the probabilities,
    so it is right if these are calibrated (`bara evaluate`: ece). With --abstain-at-risk the rows
    above the calibrated threshold are marked; its guarantee does not need that.
    """
    from rich.table import Table

    from bara.cli.terminal import console, extended_rows, say_calibrate, say_train
    from bara.data.tables import check_output_table, write_table
    from bara.evaluation.abstention import load_threshold
    from bara.evaluation.review import review as sort
    from bara.finetuning.load import load_adapter, read_task
    from bara.finetuning.task_inputs import predict_table, read_table
    from bara.machine import quieten_libraries

    quieten_libraries()
    check_output_table(output)
    options: dict[str, Any] = {"num_draws": num_draws, "seed": seed}
    threshold = None
    if abstain_at_risk is not None:
        threshold = load_threshold(adapter, abstain_at_risk, measure="predictions", **options)
    table = read_table(data, read_task(adapter), split=split)
    model, tokenizer, task = load_adapter(adapter, base_model=base_model)
    predictive = predict_table(
        model,
        tokenizer,
        task,
        table,
        labels=False,
        command="review",
        batch_size=batch_size,
        **options,
    )
    found = sort(predictive, threshold)
    index = found.order.tolist()
    records = predictive.to_records()
    columns: dict[str, list[Any]] = {
        "prediction": [records[i]["prediction"] for i in index],
        "uncertainty": found.uncertainty.tolist(),
        "expected_error_after": found.expected_error[1:].tolist(),
    }
    if found.wanted is not None:
        columns["review"] = [number < found.wanted for number in range(len(index))]
    write_table(output, extended_rows(table, index, columns, data))
    if output == "-":
        return
    view = Table(title=f"{len(index)} predictions of {adapter} for {data}")
    for heading in ("reviewed first", "share", "expected error rate of the rest"):
        view.add_column(heading, justify="right")
    counts = sorted({round(share * len(index)) for share in SHARES})
    for count in counts:
        rest = float(found.expected_error[count])
        view.add_row(f"{count}", f"{count / len(index):.0%}", f"{rest:.1%}")
    terminal = console()
    terminal.print(view)
    if found.wanted is not None and threshold is not None:
        terminal.print(
            f"The calibrated threshold asks to review the first {found.wanted}. The expected error "
            f"rate of rows like the others is at most {threshold.risk:g}, with probability "
            f"{1 - threshold.delta:g} over the calibration data; by the probabilities it is "
            f"{float(found.expected_error[found.wanted]):.1%}.",
            soft_wrap=True,
        )
    terminal.print(f"{output} has all of them, the most uncertain first.", soft_wrap=True)
    if threshold is None:
        say_calibrate(adapter)
    else:
        say_train(adapter)
