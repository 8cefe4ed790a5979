"""What every request passes first: its key, its size, its time."""

from __future__ import annotations

import asyncio
import hmac
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bara.serving.limits import Limits
from bara.serving.metrics import Metrics
from bara.serving.problems import Problem

OPEN = ("/", "/healthz")
"""What needs no key: the page, which asks for one, and whether the server lives."""
GRACE = 5.0
"""Seconds after the time limit, in which the answer that says so is sent."""
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


class Guard:
    """Refuses before anything is computed, and counts what was answered.

    Args:
        app: what answers.
        limits: `body` and `seconds`.
        metrics: is told of every answer.
        key: that clients send as a bearer token; None for everybody.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, key: str | None) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        body = _Body(receive, self.limits.body)
        status = 499  # the client's going away, unless something is sent

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        try:
            async with asyncio.timeout(self.limits.seconds + GRACE):
                self._check(scope)
                await self.app(scope, body.receive, counted)
        except Problem as problem:
            await problem.response()(scope, receive, counted)
        except TimeoutError:
            if status != 499:
                raise  # in the middle of an answer: the connection is cut
            late = Problem(504, f"not done in {self.limits.seconds:g} seconds")
            if not body.complete:
                late = Problem(408, f"the body took more than {self.limits.seconds:g} seconds")
            await late.response()(scope, receive, counted)
        except Exception:
            status = 500  # what is outside of here answers, and writes the log
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.told_request(route, status, time.perf_counter() - started)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.key is not None and scope["path"] not in OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            same = hmac.compare_digest(given.strip(), self.key)  # whatever they have in common
            if kind.lower() != b"bearer" or not same:
                raise Problem(
                    401,
                    "this server wants its key: send Authorization: Bearer KEY",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body:
            raise _too_large(self.limits.body)


class _Body:
    """A request's body, as long as it is short enough."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._left = self._most = most
        self.complete = False

    async def receive(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
            if self._left < 0:
                raise _too_large(self._most)
        return message


def _too_large(most: int) -> Problem:
    return Problem(413, f"the body has more than {most} bytes: send fewer texts at a time")
