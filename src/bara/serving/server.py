"""The server process."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from bara.errors import BaraError
from bara.serving.guard import GRACE
from bara.serving.limits import Limits

SHORTEST_KEY = 16
BACKLOG = 2048
"""Connections that the system keeps until they are taken."""


def read_key(path: Path) -> str:
    """The key in a file.

    Raises:
        BaraError: there is none, or one that could be guessed.
    """
    try:
        key = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BaraError(f"--api-key-file: {path} cannot be read") from error
    if len(key) < SHORTEST_KEY or not key.isascii() or any(c.isspace() for c in key):
        raise BaraError(
            f"--api-key-file: {path} must hold one key of {SHORTEST_KEY} letters or more, without "
            "spaces; make one with `openssl rand -hex 32`"
        )
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        BaraError: the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BaraError(f"--host, --port: cannot listen on {host}:{port}: {reason}") from error


def run(app: FastAPI, *, listener: socket.socket, limits: Limits) -> None:
    """Serves until it is told to stop; then it takes no more and finishes what it has."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.seconds + GRACE),
    )
    uvicorn.Server(config).run(sockets=[listener])
