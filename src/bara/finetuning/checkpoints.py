"""Checkpoints of a run: the newest whole one, and a folder made ready."""

from __future__ import annotations

import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from bara.cards.adapter_files import (
    CONFIG_FILE,
    MODEL_FILE,
    RECIPE_FILE,
    TASK_FILE,
    WEIGHTS_FILE,
)
from bara.errors import BaraError
from bara.files import atomic_write_text, only_writer
from bara.finetuning.task_inputs import load_task
from bara.language.tasks import Task
from bara.methods.recipe import TrainRecipe
from bara.methods.table import parse_method
from bara.schema import read_json, shown
from bara.training.trainer import COMPLETE

CHECKPOINTS = "checkpoints"
STATE_FILE = "trainer_state.json"
WEIGHTS = (WEIGHTS_FILE, MODEL_FILE, f"{MODEL_FILE}.index.json")
UNCHANGED = (
    *("model", "method", "method_options", "task", "scoring"),
    *("text_column", "text_pair_column", "label_column"),
)
"""What a run that is resumed learns, and with what."""
TYPED = {"method_options": "--rank, --set method_options"}
"""Options of the command line that do not have the name of the recipe's."""
ZIP_FILES = {
    "optimizer.pt": "optimizer.pt",
    "scheduler.pt": "scheduler.pt",
    "rng_state.pth": "rng_state*.pth",  # one for each process
}
"""What `Trainer` goes on with besides the weights; without one of them it would start it anew."""


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps among those that were written to their end."""
    whole = {}
    for path in folder.glob(f"checkpoint-*/{COMPLETE}"):
        if step := re.fullmatch(r"checkpoint-(\d{1,18})", path.parent.name):
            whole[int(step[1])] = path.parent
    return whole[max(whole)] if whole else None


def only_run(output: Path) -> AbstractContextManager[None]:
    """Keeps a second training out of a folder for as long as the context lasts.

    Raises:
        BaraError: another process trains there.
    """
    return only_writer(
        output / CHECKPOINTS / "run.lock",
        f"another `bara train` is writing to {output}; wait for it, or give another --output",
    )


def check_output(output: Path, recipe: TrainRecipe, *, resume: bool, overwrite: bool) -> None:
    """Whether a training may write to a folder.

    Raises:
        BaraError: there is something, without `overwrite`; or, to resume, there is no whole
            checkpoint, or one of another recipe.
    """
    checkpoint = newest_checkpoint(output / CHECKPOINTS)
    if resume and checkpoint is None:
        raise BaraError(f"{output / CHECKPOINTS} has no complete checkpoint to resume from")
    if resume:
        assert checkpoint is not None
        _require_whole(checkpoint)
        earlier = TrainRecipe.load(output / CHECKPOINTS / RECIPE_FILE)
        for name in UNCHANGED:
            if (before := getattr(earlier, name)) != getattr(recipe, name):
                raise BaraError(
                    f"the run in {output} has {name} = {before}: it can only be resumed with that "
                    f"({TYPED.get(name, '--' + name.replace('_', '-'))})"
                )
        if not parse_method(recipe.method)[0].trainer.resumes:
            raise BaraError(
                f"the run in {output} cannot be resumed: checkpoints of method {recipe.method} "
                "lack what it goes on with; start it anew (--overwrite)"
            )
    trained = any((output / name).exists() for name in (CONFIG_FILE, RECIPE_FILE))
    if not resume and not overwrite and (checkpoint or trained):
        raise BaraError(
            f"{output} holds an earlier run: go on with it (--resume), replace it (--overwrite) "
            "or give another --output"
        )


def prepare_checkpoints(
    folder: Path, recipe: TrainRecipe, task: Task, *, resume: bool
) -> Path | None:
    """Makes the folder ready for a run; returns the checkpoint that it goes on from.

    Raises:
        BaraError: the run that is resumed learned another task, as other data may make of the
            recipe, or the folder cannot be written.
    """
    checkpoint = newest_checkpoint(folder) if resume else None
    if checkpoint and (folder / TASK_FILE).is_file():
        earlier, now = asdict(load_task(folder)), asdict(task)
        for name in now:
            if name != "max_length" and earlier.get(name) != now[name]:
                raise BaraError(
                    f"the run in {folder.parent} has {name} = {shown(earlier.get(name))}, and this "
                    f"table {shown(now[name])}: resume it with the table that it began with"
                )
    try:
        for other in folder.glob("checkpoint-*"):
            if not (resume and (other / COMPLETE).exists()):
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / RECIPE_FILE, recipe.to_yaml())
        task.save(folder / TASK_FILE)
    except OSError as error:
        raise BaraError(f"cannot write to {folder}: {error.strerror}") from error
    return checkpoint


def _require_whole(checkpoint: Path) -> None:
    """Refuses a checkpoint that lost a file: the training would not go on as it was."""
    mend = f"restore it, or remove {checkpoint} to resume from an earlier one"
    read_json(checkpoint / STATE_FILE, dict[str, Any], mend)
    if not any((checkpoint / name).is_file() for name in WEIGHTS):
        raise BaraError(f"{checkpoint} has no {WEIGHTS_FILE}; {mend}")
    for name, pattern in ZIP_FILES.items():
        files = list(checkpoint.glob(pattern))
        if not files:
            raise BaraError(f"{checkpoint} has no {name}; {mend}")
        for file in files:
            if not is_zipfile(file):
                raise BaraError(f"{file} is cut off or damaged; {mend}")
