"""Checkpoints of a run: the newest whole one, and a folder made ready."""

from __future__ import annotations

import shutil
from pathlib import Path

from bara.cards.adapter_files import CONFIG_FILE, RECIPE_FILE
from bara.errors import BaraError
from bara.methods.recipe import TrainRecipe
from bara.training.trainer import COMPLETE

CHECKPOINTS = "checkpoints"


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps among those that were written to their end."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def check_output(output: Path, recipe: TrainRecipe, *, resume: bool, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise BaraError(f"{output} is a file; give a folder with --output")
    checkpoint = newest_checkpoint(output / CHECKPOINTS)
    if resume and checkpoint is None:
        raise BaraError(f"{output / CHECKPOINTS} has no complete checkpoint to resume from")
    if resume:
        earlier = TrainRecipe.load(output / CHECKPOINTS / RECIPE_FILE)
        for name in ("model", "method", "method_options"):
            if (before := getattr(earlier, name)) != getattr(recipe, name):
                raise BaraError(
                    f"the run in {output} has {name} = {before}: it can only be resumed with that"
                )
    trained = any((output / name).exists() for name in (CONFIG_FILE, RECIPE_FILE))
    if not resume and not overwrite and (checkpoint or trained):
        raise BaraError(
            f"{output} holds an earlier run: go on with it (--resume), replace it (--overwrite) "
            "or give another --output"
        )


def prepare_checkpoints(folder: Path, recipe: TrainRecipe, *, resume: bool) -> Path | None:
    checkpoint = newest_checkpoint(folder) if resume else None
    try:
        for other in folder.glob("checkpoint-*"):
            if not (resume and (other / COMPLETE).exists()):
                shutil.rmtree(other)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE_FILE).write_text(recipe.to_yaml(), "utf-8")
    except OSError as error:
        raise BaraError(f"cannot write to {folder}: {error.strerror}") from error
    return checkpoint
