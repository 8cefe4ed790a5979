"""Who runs the trials of a search: this process, processes beside it, or a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import connection, get_context, parent_process
from threading import Thread

import torch

from bara.errors import BaraError, first_line, last_line
from bara.finetuning.trials import Search, run_trial
from bara.machine import map_on_ray, quieten_libraries

LOST = "the process of a trial was lost ({}); the same command goes on, and runs that trial again"


def run_local(search: Search, trials: Sequence[int], jobs: int | None) -> Iterator[int]:
    """Runs the trials on this machine, each in a process of its own if there are several at a time.

    Args:
        search: a search that has begun.
        trials: which, of those that were asked for.
        jobs: trials at a time; None stands for 1.

    Yields:
        Optuna's numbers of them, as they end.

    Raises:
        BaraError: a process was killed.
    """
    if jobs is None or jobs == 1:
        yield from map(partial(run_trial, search), trials)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    # not a fork: threads of PyTorch and of tokenisers do not survive one
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin_process, (threads,))
    try:
        for future in as_completed([pool.submit(run_trial, search, n) for n in trials]):
            yield future.result()
    except BrokenProcessPool as error:
        raise BaraError(LOST.format(first_line(error))) from error
    finally:
        pool.shutdown(cancel_futures=True)


def run_on_ray(
    search: Search,
    trials: Sequence[int],
    jobs: int | None,
    *,
    address: str | None = None,
    num_gpus: float | None = None,
) -> Iterator[int]:
    """Runs the trials on a Ray cluster, whose machines have to see the search's folder.

    Args:
        search, trials: see `run_local`.
        jobs: trials at a time; None leaves it to the cluster.
        address: see `bara.machine.ray_cluster`.
        num_gpus: of each trial; None gives each one where there are any.

    Yields, Raises: as `run_local`.
    """
    run = partial(run_trial, replace(search, folder=search.folder.absolute()))
    ended = map_on_ray(run, trials, at_once=jobs, address=address, num_gpus=num_gpus)
    for _, number in ended:
        if isinstance(number, Exception):
            raise BaraError(LOST.format(last_line(number))) from number
        yield number


def _begin_process(threads: int) -> None:
    torch.set_num_threads(threads)
    quieten_libraries()
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
