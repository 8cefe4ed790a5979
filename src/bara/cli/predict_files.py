"""`bara predict --executor`: files and folders of tables."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from bara.cli.options import Executor, refuse_without_ray
from bara.errors import BaraError


class Formats(StrEnum):
    """Of files of predictions."""

    csv = "csv"
    jsonl = "jsonl"
    parquet = "parquet"


ExecutorOfFiles = Annotated[
    Executor | None,
    Option(
        help="Predict a file or a folder of tables file by file, here or by Ray's workers; "
        "--output is a folder, and a second run goes on with what is missing."
    ),
]
Workers = Annotated[int | None, Option(min=1, help="Workers of --executor ray; 1 by default.")]
OutputFormat = Annotated[
    Formats | None, Option(help="Of the files of --executor; that of each table by default.")
]
KeepColumn = Annotated[
    list[str] | None,
    Option(help="Column of the tables that the files of --executor repeat. Repeatable."),
]


def predict_files(
    adapter: Path, data: str, output: str, *, refused: Mapping[str, Any], **options: Any
) -> None:
    """Predicts the files and says how many there were."""
    from bara.cli.terminal import say_calibrate
    from bara.finetuning.load import read_task
    from bara.finetuning.predict_dataset import predict_dataset
    from bara.machine import quieten_libraries

    for name, value in refused.items():
        if value is not None:
            raise BaraError(f"{name} does not go with --executor")
    ray_only = {"--workers": options["workers"], "--gpus": options["num_gpus"]}
    refuse_without_ray(options["executor"], ray_only)
    if "-" in (data, output):
        raise BaraError("--executor reads and writes files: give --data and --output")
    quieten_libraries()
    done = predict_dataset(adapter, data, output, **options | {"workers": options["workers"] or 1})
    typer.echo(
        f"{len(done.written)} files written, {len(done.skipped)} were there; "
        f"{done.rows:,} predictions"
    )
    say_calibrate(adapter, regression=read_task(adapter).task == "regression")


def refuse_without_executor(
    workers: int | None,
    gpus: float | None,
    output_format: str | None,
    keep_column: list[str] | None,
) -> None:
    """Refuses options that only --executor has."""
    refuse_without_ray(None, {"--workers": workers, "--gpus": gpus})
    for name, value in {"--output-format": output_format, "--keep-column": keep_column}.items():
        if value:
            raise BaraError(f"{name} is for --executor local or ray")
