"""The application: routes, queue and guard of a set of adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from bara.serving.batcher import Batcher
from bara.serving.guard import Guard
from bara.serving.limits import Limits
from bara.serving.metrics import Metrics
from bara.serving.problems import handle_problems
from bara.serving.routes import routes
from bara.serving.served import Served


def create_app(
    served: Sequence[Served], *, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """An ASGI application that answers for these adapters.

    Args:
        served: what `bara.serving.served.load_served` returned.
        limits: of a request and of the queue.
        api_key: that clients send as a bearer token; None for everybody.

    Returns:
        The application. When it is shut down it finishes what is in its queue first.
    """
    limits = limits or Limits()
    metrics = Metrics()
    batcher = Batcher(limits, metrics)

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
    app.include_router(routes(served, limits, metrics, batcher))
    app.add_middleware(Guard, limits=limits, metrics=metrics, key=api_key)
    return app
