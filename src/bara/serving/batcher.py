"""One queue and one thread: requests that wait together and are alike are computed together."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import Any

from bara.serving.limits import Limits
from bara.serving.metrics import Metrics
from bara.serving.problems import Problem

LOG = logging.getLogger("bara.serving")
LONGEST_RETRY = 60


@dataclass(eq=False)
class Job:
    """Work of one request.

    Attributes:
        run: computes jobs with equal `run` and `settings` together, and finishes each of them.
        settings: what jobs of one pass have in common.
        rows: rows of a batch that it takes.
        payload: what `run` works on.
        deadline: of `time.monotonic`, after which nobody waits for it.
        result: of the work.
        closed: whoever asked has gone.
        started: some of the result has been handed on, so that it cannot be tried again.
    """

    run: Callable[[Sequence[Job]], None]
    settings: tuple[Any, ...]
    rows: int
    payload: Any
    deadline: float
    result: Future[Any] = field(default_factory=Future)
    closed: Event = field(default_factory=Event)
    started: bool = False

    def finish(self, value: Any) -> None:
        """Hands the result on, unless the job has ended already."""
        with suppress(InvalidStateError):
            self.result.set_result(value)

    def fail(self, error: BaseException) -> None:
        """Hands an error on, unless the job has ended already."""
        with suppress(InvalidStateError):
            self.result.set_exception(error)

    @property
    def over(self) -> bool:
        """Nobody waits for it any more; if it is late, it fails."""
        if time.monotonic() > self.deadline:
            self.fail(
                Problem(504, "there was not time enough: ask for fewer texts, tokens or draws")
            )
        return self.closed.is_set() or self.result.done()


class Batcher:
    """Computes jobs one pass at a time, in the order in which they came.

    A pass takes the first job and every other one that waits and is alike, as far as the rows go.
    One thread for all models: passes would only take each other's processors, and the tokens of
    sampled answers come from torch's global generator.

    Args:
        limits: `queue` and `rows`.
        metrics: is told of every pass.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits = limits
        self.metrics = metrics
        self._queue: deque[Job] = deque()
        self._changed = Condition()
        self._closing = False
        self._seconds = 0.1  # of a job, running mean
        self._thread = Thread(target=self._work, name="bara-batcher", daemon=True)
        metrics.queue.set_function(lambda: len(self._queue))

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Waits until everything in the queue is done; nothing is taken any more."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts the jobs of one request into the queue: all or none.

        Raises:
            Problem: 503, with `Retry-After`: the queue is full, or the server is stopping.
        """
        with self._changed:
            if self._closing or len(self._queue) + len(jobs) > self.limits.queue:
                wait = math.ceil(len(self._queue) * self._seconds)
                after = str(min(LONGEST_RETRY, max(1, wait)))
                state = "stopping" if self._closing else f"busy: {len(self._queue)} requests wait"
                raise Problem(503, f"the server is {state}", headers={"Retry-After": after})
            self._queue.extend(jobs)
            self._changed.notify()

    def _work(self) -> None:
        while batch := self._take():
            start = time.perf_counter()
            self._run(batch)
            seconds = time.perf_counter() - start
            self._seconds += 0.1 * (seconds / len(batch) - self._seconds)
            self.metrics.told_pass(len(batch), sum(job.rows for job in batch), seconds)

    def _take(self) -> list[Job]:
        """The next pass; empty at the end."""
        with self._changed:
            while True:
                self._queue = deque(job for job in self._queue if not job.over)
                if self._queue or self._closing:
                    break
                self._changed.wait()
            batch: list[Job] = []
            left: deque[Job] = deque()
            rows = 0
            for job in self._queue:
                alike = not batch or (job.run, job.settings) == (batch[0].run, batch[0].settings)
                if alike and (not batch or rows + job.rows <= self.limits.rows):
                    batch.append(job)
                    rows += job.rows
                else:
                    left.append(job)
            self._queue = left
            return batch

    def _run(self, batch: Sequence[Job]) -> None:
        try:
            batch[0].run(batch)
        except Exception as error:
            if len(batch) > 1 and not any(job.started for job in batch):
                for job in batch:  # one of them may have spoilt it for all
                    self._run([job])
                return
            if not isinstance(error, Problem):
                LOG.error("a pass failed", exc_info=error)
            for job in batch:
                job.fail(error)
