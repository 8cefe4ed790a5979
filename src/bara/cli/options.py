"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from bara.errors import BaraError
from bara.schema import MAX_DRAWS, SEEDS


class Executor(StrEnum):
    """Who does the work: this machine, or a Ray cluster."""

    local = "local"
    ray = "ray"


def refuse_without_ray(executor: Executor | None, options: dict[str, object]) -> None:
    """Refuses options that only Ray has.

    Raises:
        BaraError: one of them is given without `--executor ray`.
    """
    for name, value in options.items():
        if value is not None and executor != Executor.ray:
            raise BaraError(f"{name} is for --executor ray")


def probability(value: float | None) -> float | None:
    """A callback of options that lie between 0 and 1; typer names the option that was typed."""
    if value is not None and not 0 < value < 1:
        raise BadParameter(f"it must lie between 0 and 1, not be {value:g}")
    return value


Adapter = Annotated[Path, Argument(help="Folder that `bara train` wrote.")]
BaseModel = Annotated[str | None, Option(help="Where the base model is now.")]
Split = Annotated[str | None, Option(help="Split of a hub data set.")]
NumDraws = Annotated[int, Option(min=1, max=MAX_DRAWS, help="Posterior draws.")]
Seed = Annotated[int, Option(min=0, max=SEEDS - 1, help="Seed of the draws.")]
BatchSize = Annotated[int, Option(min=1, max=1_000_000, help="Texts times draws in one pass.")]
HeldOut = Annotated[
    str | None,
    Option(help="Table to measure the change on; without it, every second text of --data."),
]
AbstainAtRisk = Annotated[
    float | None,
    Option(
        callback=probability,
        help="Abstain above the threshold that `bara evaluate --calibrate-risk` found.",
    ),
]
MaxNewTokens = Annotated[
    int | None, Option(min=1, max=1_000_000, help="Longest answer in tokens; 128 by default.")
]
GenerateOptions = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any option of transformers.generate, e.g. num_beams=4. Repeatable.",
    ),
]
RayAddress = Annotated[
    str | None, Option(help="Address of the Ray cluster; that of the environment by default.")
]
Gpus = Annotated[
    float | None,
    Option(min=0, help="GPUs of each worker on Ray; by default 1 where there are any."),
]
Force = Annotated[bool, Option("--force", help="Replace files in the output folder.")]
