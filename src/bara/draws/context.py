"""Attributes that belong to a call: every thread and every asyncio task sees its own value."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

_VALUES: ContextVar[Mapping[tuple[int, str], Any]] = ContextVar("bara", default={})  # noqa: B039
"""Never changed in place: a new thread starts without values, a new task with a copy of them."""
_THREAD = threading.local()


class PerContext:
    """An attribute of an object with one value per thread or task, None where none was set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else _VALUES.get().get((id(instance), self.name))

    def __set__(self, instance: Any, value: Any) -> None:
        values = dict(_VALUES.get())
        values[id(instance), self.name] = value
        if value is None:
            del values[id(instance), self.name]
        _VALUES.set(values)


class PerThread:
    """An attribute with one value per thread, None where none was set.

    For what begins and ends without waiting in between, so that no task can come in; unlike a
    context variable it is known to torch.compile.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"{owner.__name__}_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        values: dict[int, Any] = getattr(_THREAD, self.name, {})
        return values.get(id(instance))

    def __set__(self, instance: Any, value: Any) -> None:
        values = dict(getattr(_THREAD, self.name, {}))
        values[id(instance)] = value
        if value is None:
            del values[id(instance)]
        setattr(_THREAD, self.name, values)
