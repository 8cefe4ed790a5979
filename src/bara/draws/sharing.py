"""One model for several threads: evaluation mode as long as anybody predicts, and one at a time
where a draw changes the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from bara.errors import BaraError

_REGISTER = Lock()
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_STREAMED: WeakSet[nn.Module] = WeakSet()
_USERS: WeakKeyDictionary[nn.Module, tuple[int, set[nn.Module]]] = WeakKeyDictionary()
"""How many evaluate a model, and which of its modules were in training mode before."""


def lock_of(model: nn.Module) -> Any:
    """The lock (reentrant) of what only one thread at a time may do with a model."""
    with _REGISTER:
        return _LOCKS.setdefault(model, RLock())


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing in other threads, with whatever they call it: torch enters a hook
    before it notes that the hook takes keyword arguments."""
    thread = get_ident()
    return lambda *given: hook(*given) if get_ident() == thread else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode; whoever leaves last puts it back as it was."""
    with _REGISTER:
        users, trained = _USERS.get(model, (0, set()))
        if users == 0:
            trained = {module for module in model.modules() if module.training}
            model.eval()
        _USERS[model] = users + 1, trained
    try:
        yield
    finally:
        with _REGISTER:
            users, trained = _USERS.pop(model)
            if users > 1:
                _USERS[model] = users - 1, trained
            else:
                model.train(model in trained)
                for module in model.modules():  # parts may be in evaluation mode for good
                    module.training = module in trained


@contextmanager
def decoding(model: nn.Module, *, stream: bool = False) -> Iterator[None]:
    """One decoding of a model at a time; another waits for its end.

    Args:
        model: the model.
        stream: whoever reads the tokens decides when it ends, so that nobody waits for it.

    Raises:
        BaraError: a stream is open.
    """
    with _REGISTER:
        if model in _STREAMED:
            raise BaraError(
                "A stream of this model's tokens is open (bara.generate_stream): read it to its "
                "end or close() it before the model decodes again."
            )
        if stream:
            _STREAMED.add(model)
    try:
        with lock_of(model):
            yield
    finally:
        if stream:
            with _REGISTER:
                _STREAMED.discard(model)
