"""`bara predict`: probabilities and uncertainties for a table or a stream of texts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from bara.cli.options import (
    AbstainAtRisk,
    Adapter,
    BaseModel,
    BatchSize,
    Gpus,
    NumDraws,
    Seed,
    Split,
    probability,
)
from bara.cli.predict_files import (
    ExecutorOfFiles,
    KeepColumn,
    OutputFormat,
    Workers,
    predict_files,
    refuse_without_executor,
)
from bara.cli.review import REVIEWED_TASKS
from bara.schema import json_text

CHUNK = 64
"""Texts that are read, predicted and written at a time."""


def predict(
    adapter: Adapter,
    data: Annotated[
        str,
        Option(help="Table of texts, or folder of images; - reads JSONL from standard input."),
    ] = "-",
    output: Annotated[str, Option(help="JSONL file; - is standard output.")] = "-",
    split: Split = None,
    num_draws: NumDraws = 10,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    abstain_at_risk: AbstainAtRisk = None,
    coverage: Annotated[
        float | None,
        Option(
            callback=probability,
            help="Add prediction sets or intervals that hold the truth with this probability, as "
            "`bara evaluate --calibrate-conformal` calibrated them.",
        ),
    ] = None,
    base_model: BaseModel = None,
    executor: ExecutorOfFiles = None,
    workers: Workers = None,
    gpus: Gpus = None,
    output_format: OutputFormat = None,
    keep_column: KeepColumn = None,
) -> None:
    """Write one JSON object per text, question or image: the prediction and how uncertain it is.

    For a seq2seq adapter they are the answers of `bara generate`, which has options for decoding.
    """
    if executor is not None:
        refused = {"--split": split, "--abstain-at-risk": abstain_at_risk, "--coverage": coverage}
        common = {"num_draws": num_draws, "seed": seed, "batch_size": batch_size}
        predict_files(
            adapter,
            data,
            output,
            refused=refused,
            executor=executor,
            workers=workers,
            num_gpus=gpus,
            output_format=output_format,
            keep_columns=keep_column or (),
            base_model=base_model,
            **common,
        )
        return
    refuse_without_executor(workers, gpus, output_format, keep_column)
    from bara.cli.generate import generate
    from bara.cli.terminal import row_count, say_calibrate, say_next
    from bara.data.images import ImageTask, located
    from bara.data.tables import chunked, table_from_records
    from bara.errors import BaraError
    from bara.evaluation.abstention import load_threshold
    from bara.evaluation.conformal import load_conformal
    from bara.files import atomic_write_text
    from bara.finetuning.load import load_adapter, read_task
    from bara.finetuning.task_inputs import predict_table, records_of
    from bara.language.tasks import is_seq2seq
    from bara.machine import quieten_libraries
    from bara.prediction.predictive import RegressionPredictive

    quieten_libraries()
    if is_seq2seq(read_task(adapter)):
        for name, value in {"--split": split, "--coverage": coverage}.items():
            if value is not None:
                raise BaraError(f"{name} is not for adapters that write texts (seq2seq)")
        generate(
            adapter,
            data=data,
            output=output,
            num_draws=num_draws,
            seed=seed,
            batch_size=batch_size,
            abstain_at_risk=abstain_at_risk,
            base_model=base_model,
        )
        return
    conditions = {"num_draws": num_draws, "seed": seed}
    options: dict[str, Any] = {"batch_size": batch_size, "progress": False, **conditions}
    threshold, conformal = None, None
    if abstain_at_risk is not None:
        threshold = load_threshold(adapter, abstain_at_risk, measure="predictions", **conditions)
    if coverage is not None:
        conformal = load_conformal(adapter, **conditions)
    source = "standard input" if data == "-" else data
    with ExitStack() as files:
        rows = _read(data, split, read_task(adapter), files)
        total = row_count(rows, data)
        chunks = chunked(rows, CHUNK)
        first_chunk = next(chunks, None)
        if first_chunk is None:
            raise BaraError(f"{source} has no rows; give at least one")
        model, tokenizer, task = load_adapter(adapter, base_model=base_model)

        def records(chunk: list[dict[str, Any]], first_row: int) -> list[dict[str, Any]]:
            table = table_from_records(chunk, source, first_row=first_row)
            if isinstance(task, ImageTask):
                table = located(table, Path())
            predictive: Any = predict_table(
                model, tokenizer, task, table, labels=False, first_row=first_row, **options
            )
            found = records_of(predictive, task, table)
            if threshold is not None:
                if isinstance(predictive, RegressionPredictive):
                    raise BaraError("--abstain-at-risk is not for regression: leave it out")
                threshold.take_back(found, 1 - predictive.confidence)
            if conformal is not None and coverage is not None:
                more = conformal.to_records(predictive, coverage)
                found = [record | sets for record, sets in zip(found, more, strict=True)]
            return found

        lines = _lines(chain([first_chunk], chunks), records, total)
        if output == "-":
            _stream(lines)
            return
        atomic_write_text(output, "".join(lines))
    print(f"The predictions are in {output}.")
    if threshold is None:
        say_calibrate(adapter, regression=task.task == "regression")
    elif task.task in REVIEWED_TASKS:
        same: list[object] = ["--data", "TABLE" if data == "-" else data]
        same += [] if split is None else ["--split", split]
        same += ["--abstain-at-risk", f"{abstain_at_risk:g}"]
        same += ["--num-draws", num_draws, "--seed", seed]
        say_next(["bara", "review", adapter, *same, "--output", "review.csv"])
    else:
        say_next(["bara", "serve", adapter])


def _lines(
    chunks: Iterable[list[dict[str, Any]]],
    records: Callable[[list[dict[str, Any]], int], list[dict[str, Any]]],
    total: int | None,
) -> Iterator[str]:
    """The predictions as JSONL, a chunk computed when its first line is asked for."""
    from tqdm.auto import tqdm

    first_row = 1
    with tqdm(desc="predicting", unit="text", total=total, disable=None) as bar:
        for chunk in chunks:
            for record in records(chunk, first_row):
                yield json_text(record, ensure_ascii=False) + "\n"
            first_row += len(chunk)
            bar.update(len(chunk))


def _stream(lines: Iterable[str]) -> None:
    """Writes to standard output, which another program may be reading."""
    for number, line in enumerate(lines, start=1):
        sys.stdout.write(line)
        if number % CHUNK == 0:
            sys.stdout.flush()


def _read(data: str, split: str | None, task: Any, files: ExitStack) -> Iterable[dict[str, Any]]:
    from bara.data.images import ImageTask
    from bara.data.tables import read_jsonl, refuse_split
    from bara.finetuning.task_inputs import read_table

    refuse_split(data, split)
    if data == "-":
        return read_jsonl(sys.stdin, "standard input")
    if isinstance(task, ImageTask):  # whose files are found from the table's folder
        return read_table(data, task, split=split)
    if data.endswith(".jsonl") and Path(data).is_file():
        return read_jsonl(files.enter_context(open(data, encoding="utf-8-sig")), data)
    return read_table(data, task, split=split)
