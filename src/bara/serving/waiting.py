"""From the thread of the models to the requests that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from fastapi import Request

from bara.serving.batcher import Job
from bara.serving.decoding import Answer, Token
from bara.serving.problems import Problem, problem_of

GONE = 499
"""Status of a request whose client has gone; nobody sees it but the metrics."""


async def results(request: Request, jobs: Sequence[Job]) -> list[Any]:
    """What all jobs of a request give.

    Raises:
        Problem: the first of their errors, or that the client has gone.
    """
    everything = asyncio.ensure_future(_all(jobs))
    await _or_gone(request, everything, jobs)
    try:
        return await everything
    except Exception as error:
        raise problem_of(error) from error
    finally:
        close(jobs)


async def _all(jobs: Sequence[Job]) -> list[Any]:
    return [await asyncio.wrap_future(job.result) for job in jobs]


Event = tuple[int, Token | None]
"""The number of a job and its next token; None when it has ended."""


class Events:
    """The tokens of a request's jobs as they come.

    Made before the jobs are submitted, in the event loop.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._first: Event | None = None
        loop = asyncio.get_running_loop()

        def put(index: int, token: Token | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._queue.put_nowait, (index, token))

        def ended(index: int, _: Future[Any]) -> None:
            put(index, None)

        for index, job in enumerate(jobs):
            job.payload.listener = partial(put, index)
            job.result.add_done_callback(partial(ended, index))

    async def begin(self, request: Request) -> None:
        """Waits for the first token, so that what fails before it has a status of its own.

        Raises:
            Problem: a job failed first, or the client has gone.
        """
        first = asyncio.ensure_future(self._queue.get())
        await _or_gone(request, first, self.jobs)
        self._first = await first
        index, token = self._first
        if token is None and (error := self.jobs[index].result.exception()):
            close(self.jobs)
            raise problem_of(error) from error

    async def read(self) -> AsyncIterator[Event]:
        """All events; closes the jobs when nobody reads on.

        Raises:
            Problem: a job failed.
        """
        left = len(self.jobs)
        try:
            while left:
                event = self._first or await self._queue.get()
                self._first = None
                if event[1] is None:
                    left -= 1
                    if error := self.jobs[event[0]].result.exception():
                        raise problem_of(error) from error
                yield event
        finally:
            close(self.jobs)

    def answers(self) -> list[Answer]:
        """The jobs' answers, once all have ended."""
        return [job.payload for job in self.jobs]


def close(jobs: Sequence[Job]) -> None:
    """Nobody waits for these any more: those in the queue are dropped, answers are broken off."""
    for job in jobs:
        job.closed.set()


async def _or_gone(request: Request, work: asyncio.Future[Any], jobs: Sequence[Job]) -> None:
    """Waits for the work, but not for longer than the client does."""
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Problem(GONE, "the client has gone")
    finally:
        gone.cancel()
        if not work.done():
            close(jobs)
            work.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
