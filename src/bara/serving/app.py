"""The application: routes, queue and guard of a set of adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from bara.errors import BaraError
from bara.serving.batcher import Batcher
from bara.serving.guard import Guard
from bara.serving.limits import Limits
from bara.serving.metrics import Metrics
from bara.serving.problems import handle_problems
from bara.serving.routes import routes
from bara.serving.served import Served
from bara.serving.shelf import Shelf


def create_app(
    served: Sequence[Served],
    *,
    limits: Limits | None = None,
    api_key: str | None = None,
    load_from: Path | None = None,
    base_model: str | None = None,
) -> FastAPI:
    """An ASGI application that answers for these adapters.

    Args:
        served: what `bara.serving.served.load_served` returned.
        limits: of a request and of the queue.
        api_key: that clients send as a bearer token; None for everybody.
        load_from: folder that clients may load adapters from; needs a key.
        base_model: where the base model of those is, as of `load_served`.

    Returns:
        The application. When it is shut down it finishes what is in its queue first.

    Raises:
        BaraError: clients may load adapters, and there is no key.
    """
    if load_from is not None and api_key is None:
        raise BaraError("load_from lets clients load adapters: give api_key too")
    limits = limits or Limits()
    metrics = Metrics()
    batcher = Batcher(limits, metrics)
    shelf = Shelf(served, limits, metrics, load_from=load_from, base_model=base_model)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await run_in_threadpool(batcher.close)

    app = FastAPI(
        title="bara",
        version=version("bara-peft"),
        description="Predictions and texts with their uncertainty.",
        lifespan=lifespan,
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
    )
    handle_problems(app)
    app.include_router(routes(shelf, metrics, batcher))
    app.add_middleware(Guard, limits=limits, metrics=metrics, key=api_key)
    return app
