"""Predictions for a file or a folder of tables, in this process or by workers on a Ray cluster."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from tqdm.auto import tqdm

from bara.cards.adapter_files import CONFIG_FILE, CONFORMAL_FILE, RECIPE_FILE, TASK_FILE
from bara.data.images import ImageTask
from bara.data.tables import FILE_SUFFIXES, csv_text, parquet_rows
from bara.errors import BaraError, last_line
from bara.files import atomic_write_bytes, atomic_write_text, only_writer
from bara.finetuning.load import load_adapter, read_task
from bara.finetuning.prediction_parts import CHUNK, Unit, join, units_of
from bara.finetuning.task_inputs import predict_table, read_table, records_of
from bara.machine import Executor, check_executor, gpus_each, ray_cluster
from bara.methods.recipe import TrainRecipe
from bara.prediction.temperature import TEMPERATURE_FILE
from bara.schema import json_text

Format = Literal["csv", "jsonl", "parquet"]
SETTINGS_FILE = ".bara-predictions.json"
"""What the files of an output folder were predicted with."""
DECIDING_FILES = (CONFIG_FILE, "config.json", TASK_FILE, TEMPERATURE_FILE)
"""Files of an adapter, or of a whole model, that decide predictions besides its weights."""
LOCK_FILE = ".bara-predictions.lock"


class PredictedFiles(NamedTuple):
    """What a run did.

    Attributes:
        written: files that it wrote.
        skipped: files that an earlier run had written.
        rows: predictions in `written`.
    """

    written: list[Path]
    skipped: list[Path]
    rows: int


@dataclass(frozen=True)
class Job:
    """How every file is predicted; each worker makes its own model of it."""

    adapter: str
    base_model: str | None
    num_draws: int
    seed: int
    batch_size: int
    keep_columns: tuple[str, ...]

    @cached_property
    def loaded(self) -> tuple[Any, Any, Any]:
        return load_adapter(self.adapter, base_model=self.base_model)

    def run(
        self, unit: Unit, advance: Callable[[float], object] = lambda share: None
    ) -> dict[str, Any]:
        """Predicts one unit; its output appears when it is whole. An error belongs to the table.

        `advance` is called after every chunk with its share of the rows.
        """
        try:
            records = list(self._records(unit, advance))
            atomic_write_bytes(unit.target, _encoded(records, Path(unit.target).suffix))
        except BaraError as error:
            return {"source": unit.source, "rows": 0, "error": str(error)}
        return {"source": unit.source, "rows": len(records), "error": ""}

    def _records(self, unit: Unit, advance: Callable[[float], object]) -> Iterator[dict[str, Any]]:
        model, tokenizer, task = self.loaded
        if unit.last:
            table = parquet_rows(Path(unit.source), unit.first, unit.last)
        else:
            table = read_table(unit.source, task)
        if missing := [name for name in self.keep_columns if name not in table.column_names]:
            raise BaraError(f"there is no column {missing[0]!r} to keep (--keep-column)")
        for first in range(0, len(table), CHUNK):
            part = table.select(range(first, min(first + CHUNK, len(table))))
            predictive = predict_table(
                model,
                tokenizer,
                task,
                part,
                labels=False,
                first_row=unit.first + first + 1,
                num_draws=self.num_draws,
                seed=self.seed,
                batch_size=self.batch_size,
                progress=False,
            )
            kept = part.select_columns(list(self.keep_columns)).to_list()
            records = records_of(predictive, task, part)
            for row, record in zip(kept or [{}] * len(part), records, strict=True):
                both = row.keys() & record.keys()
                if twice := sorted(name for name in both if row[name] != record[name]):
                    raise BaraError(
                        f"a prediction has a {twice[0]!r} too; rename the column to keep "
                        "(--keep-column)"
                    )
                yield row | record
            advance(len(part) / len(table))


def predict_dataset(
    adapter: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    executor: Executor = "local",
    workers: int = 1,
    output_format: Format | None = None,
    keep_columns: Sequence[str] = (),
    num_draws: int = 10,
    seed: int = 0,
    batch_size: int = 256,
    base_model: str | None = None,
    num_cpus: float = 1,
    num_gpus: float | None = None,
    ray_address: str | None = None,
) -> PredictedFiles:
    """Predict a file or a folder of tables, file by file, and write a folder of predictions.

    On a terminal a bar on standard error tells how much of the files is done, and the time left.

    A file of predictions is written whole or not at all, and has one row for each row of the table,
    in order. A Parquet file of more than 65,536 rows is predicted in parts of so many, by as many
    workers as there are, which are made one file at the end. A run that was interrupted is started
    again: files and parts that are there already, and are not older than their tables, are skipped.
    The numbers do not depend on the executor, nor on the number of workers, as long as each has as
    many threads.

    Args:
        adapter: folder that `bara train` wrote.
        data: a `.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet` file, or a folder of them, searched
            with its subfolders. Each has to fit a worker's memory, or of a Parquet file with texts
            the row groups that a part is in.
        output: folder for the predictions, each file under its table's name; not inside `data`.
        executor: `local`, this process; or `ray`, a Ray Data pipeline with one model per worker,
            whose lost workers are replaced. All nodes have to see the three paths.
        workers: of `ray`.
        output_format: `csv` (probabilities in columns of their own), `jsonl` or `parquet`; None
            takes each table's own.
        keep_columns: columns of the tables that their predictions repeat, such as an identifier.
        num_draws, seed, batch_size: see `bara.predict`.
        base_model: where the base model is now.
        num_cpus, num_gpus: what a worker of `ray` takes; a GPU each where there are any, unless
            told otherwise.
        ray_address: of the cluster; None joins the one that the environment names, or starts one
            here.

    Raises:
        BaraError: there is nothing to read, the output folder was predicted with something else or
            is in use, Ray is missing, or files could not be predicted (the others have been).
    """
    check_executor(executor)
    if workers < 1 or (executor == "local" and workers > 1):
        raise BaraError("give one worker or more with executor='ray'; 'local' has one")
    whole = isinstance(read_task(adapter), ImageTask)
    folder = Path(output)
    targets = _targets(Path(data), folder, output_format)
    job = Job(
        str(adapter), base_model, num_draws, seed, batch_size, tuple(dict.fromkeys(keep_columns))
    )
    refusal = f"another process writes predictions into {folder}; wait for its end"
    with only_writer(folder / LOCK_FILE, refusal):
        _require_same_settings(folder, job)
        for left in folder.rglob(".*.tmp"):  # by a process that was killed
            left.unlink()
        done = [source for source in targets if _is_finished(source, targets[source])]
        pending = {s: t for s, t in targets.items() if s not in done}
        work = {s: [Unit(str(s), str(t))] if whole else units_of(s, t) for s, t in pending.items()}
        units = [unit for parts in work.values() for unit in parts]
        missing = [u for u in units if not _is_finished(Path(u.source), Path(u.target))]
        sizes = {str(s.absolute()): s.stat().st_size / len(parts) for s, parts in work.items()}
        with tqdm(  # in bytes: how many rows there are a table says only when it is read
            total=sum(sizes[str(Path(unit.source).absolute())] for unit in missing),
            desc="predicting",
            unit="B",
            unit_scale=True,
            disable=None if missing else True,
        ) as bar:

            def advance(source: str, share: float) -> None:
                bar.update(share * sizes[str(Path(source).absolute())])

            if executor == "local":
                results = [job.run(unit, partial(advance, unit.source)) for unit in missing]
            elif missing:
                options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "concurrency": workers}
                results = _run_ray(job, missing, ray_address, options, advance)
            else:
                results = []
        wrong = [result for result in reversed(results) if result["error"]]
        errors = {Path(result["source"]).absolute(): result["error"] for result in wrong}
        failed = []
        for source, parts in work.items():
            try:
                if why := errors.get(source.absolute()):
                    raise BaraError(why)
                join(parts, targets[source])
            except BaraError as error:
                failed.append(f"{source}: {error}")
    if failed:
        raise BaraError(
            f"{len(failed)} of {len(targets)} files could not be predicted, the others are in "
            f"{folder}; the first is {failed[0]}"
        )
    before = sum(unit.last - unit.first for unit in set(units) - set(missing))
    return PredictedFiles(
        list(pending.values()),
        [targets[source] for source in done],
        before + sum(result["rows"] for result in results),
    )


def _targets(data: Path, folder: Path, output_format: Format | None) -> dict[Path, Path]:
    """Where the predictions of each table go."""
    if output_format is not None and output_format not in get_args(Format):
        raise BaraError(f"output_format must be csv, jsonl or parquet, not {output_format!r}")
    if folder.exists() and not folder.is_dir():
        raise BaraError(f"{folder} is a file; give a folder for the predictions (--output)")
    if data.is_dir() and folder.resolve().is_relative_to(data.resolve()):
        raise BaraError(
            f"{folder} is inside {data}, whose files are read; give another folder (--output)"
        )
    found = sorted(data.rglob("*")) if data.is_dir() else [data]
    sources = [p for p in found if p.is_file() and p.suffix.lower() in FILE_SUFFIXES]
    if not sources:
        raise BaraError(f"there is no table at {data}: give {', '.join(FILE_SUFFIXES)} (--data)")
    root = data if data.is_dir() else data.parent
    targets: dict[Path, Path] = {}
    for source in sources:
        own = {".tsv": ".csv", ".json": ".jsonl"}.get(source.suffix.lower(), source.suffix.lower())
        suffix = f".{output_format}" if output_format else own
        target = folder / source.relative_to(root).with_suffix(suffix)
        if target in targets.values():
            raise BaraError(f"two tables would be predicted into {target}; rename {source}")
        targets[source] = target
    return targets


def _is_finished(source: Path, target: Path) -> bool:
    return target.is_file() and target.stat().st_mtime >= source.stat().st_mtime


def _require_same_settings(folder: Path, job: Job) -> None:
    """Keeps predictions that were made with something else out of one folder.

    Raises:
        BaraError: the folder has some.
    """
    unnamed = {"adapter": _digest(Path(job.adapter)), "base_model": None}
    settings = json_text(asdict(job) | unnamed) + "\n"
    path = folder / SETTINGS_FILE
    if not path.is_file():
        atomic_write_text(path, settings)
    elif path.read_text("utf-8") != settings:
        raise BaraError(
            f"the predictions in {folder} are of another adapter, other draws, seed, batch size or "
            "columns: give another folder (--output)"
        )


def _digest(adapter: Path) -> str:
    """A hash of what decides an adapter's predictions.

    Left out are calibrations, which come later and change none, and of the recipe what only
    training reads.
    """
    digest = hashlib.sha256()
    for folder in [adapter, *sorted(adapter.glob("member-*"))]:  # of an ensemble
        weights = [p for p in folder.glob("*.safetensors") if p.name != CONFORMAL_FILE]
        others = [folder / name for name in DECIDING_FILES if (folder / name).is_file()]
        for path in [*sorted(weights), *others]:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    recipe = TrainRecipe.load(adapter / RECIPE_FILE)
    read = [recipe.method, recipe.method_options, recipe.model_options]
    digest.update(json_text(read, default=str).encode())
    return digest.hexdigest()


def _encoded(records: list[dict[str, Any]], suffix: str) -> bytes:
    """The content of a file of predictions."""
    if suffix == ".jsonl":
        lines = (json_text(record, ensure_ascii=False) + "\n" for record in records)
        return "".join(lines).encode("utf-8", errors="replace")
    if suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        buffer = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(records), buffer)
        return buffer.getvalue()
    text = csv_text([_flat(record) for record in records])
    return text.encode("utf-8", errors="replace")


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose cells are no objects: `probabilities.good`; lists become JSON."""
    cells: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            cells |= {f"{name}.{key}": part for key, part in _flat(value).items()}
        else:
            cells[name] = json.dumps(value) if isinstance(value, list) else value
    return cells


class _Worker:
    """One model on a Ray cluster, for one unit at a time."""

    def __init__(self, job: Job) -> None:
        from bara.machine import quieten_libraries

        quieten_libraries()
        self.job = job

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        columns = (batch[name] for name in Unit._fields)
        units = [
            Unit(str(source), str(target), int(first), int(last))
            for source, target, first, last in zip(*columns, strict=True)
        ]
        results = [self.job.run(unit) for unit in units]
        return {name: [result[name] for result in results] for name in results[0]}


def _run_ray(
    job: Job,
    units: Sequence[Unit],
    address: str | None,
    options: dict[str, Any],
    advance: Callable[[str, float], object],
) -> list[dict[str, Any]]:
    ray = ray_cluster(address)
    options["num_gpus"] = gpus_each(ray, options["num_gpus"])
    ray.data.DataContext.get_current().enable_progress_bars = False
    # nodes may have other working directories
    rows = [
        unit._asdict()
        | {"source": str(Path(unit.source).absolute()), "target": str(Path(unit.target).absolute())}
        for unit in units
    ]
    table = ray.data.from_items(rows, override_num_blocks=len(rows))
    done = table.map_batches(
        _Worker, fn_constructor_args=(job,), batch_size=1, batch_format="numpy", **options
    )
    results: list[dict[str, Any]] = []
    try:
        for result in done.iter_rows():
            results.append(result)
            advance(result["source"], 1.0)
    except ray.exceptions.RayError as error:
        raise BaraError(
            f"the Ray cluster stopped: {last_line(error)}; start again, finished files are kept"
        ) from error
    return results
