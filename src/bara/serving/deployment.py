"""The application of `bara serve` as a deployment of Ray Serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from bara.errors import BaraError
from bara.machine import quieten_libraries
from bara.serving.app import create_app
from bara.serving.limits import Limits
from bara.serving.served import load_served


def deployment(
    adapters: Sequence[str],
    *,
    base_model: str | None = None,
    limits: Limits | None = None,
    api_key: str | None = None,
    **options: Any,
) -> Any:
    """An application for `ray.serve.run`: every replica loads the adapters and has its own queue.

    Args:
        adapters: folders, or NAME=FOLDER, where the replicas find them.
        base_model: where the base model of all of them is.
        limits: of a request and of each replica's queue.
        api_key: that clients send.
        **options: of `ray.serve.deployment`, such as `num_replicas` and `ray_actor_options`.

    Raises:
        BaraError: Ray Serve is missing.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise BaraError('Ray Serve is missing; run `pip install "ray[serve]"`') from error

    def build() -> FastAPI:  # on a replica
        quieten_libraries()
        served = load_served([str(adapter) for adapter in adapters], base_model=base_model)
        return create_app(served, limits=limits, api_key=api_key)

    decorate: Any = serve.deployment(name="bara", **options)
    return decorate(serve.ingress(build)()).bind()
