"""Files that are either written whole or not at all, and by one process at a time."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from bara.errors import BaraError


def atomic_write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """`atomic_file` with these bytes."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write the file ``path`` in the body; missing parent folders are made.

    The bytes go to a temporary file beside ``path``, which takes its place only when complete.
    What is not a file (``/dev/null``, a named pipe) is written to as it is.

    Yields:
        The file to write to.

    Raises:
        BaraError: it cannot be written (a full disk, no permission, …). On this and on any other
            exception a file that was there before is unchanged and nothing else is left behind.
    """
    target = Path(os.path.realpath(path))
    temporary = _sibling(target)
    try:
        if _is_device(Path(path)):
            with open(path, "wb") as file:
                yield file
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write_bytes` of ``text`` as UTF-8; what UTF-8 cannot hold (a lone half of a
    surrogate pair, as broken JSON has it) becomes a question mark."""
    atomic_write_bytes(path, text.encode("utf-8", errors="replace"))


@contextmanager
def atomic_directory(path: str | os.PathLike[str], *, drop: Collection[str] = ()) -> Iterator[Path]:
    """Fill a temporary folder in the body; it becomes the folder ``path`` when the body succeeds.

    Files and folders of the same name in an earlier ``path`` are replaced, others stay, so that
    no choice of ``path`` deletes anything it does not write. Names in ``drop`` go too.

    Yields:
        The temporary folder, beside ``path``.

    Raises:
        BaraError: the body or the exchange met a file-system error (or safetensors did). On this
            and on any other exception the earlier folder survives and the temporary one is gone.
    """
    target = Path(os.path.realpath(path))
    temporary = _sibling(target)
    try:
        if target.exists() and not target.is_dir():
            raise BaraError(f"cannot write the folder {path}: a file of that name exists")
        if Path.cwd().is_relative_to(target):
            raise BaraError(
                f"cannot write the folder {path}: it is, or holds, the current folder; "
                "name a folder inside it"
            )
        temporary.mkdir(parents=True)
        yield temporary
        _flush(temporary)
        _exchange(temporary, target, drop)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sibling(target: Path) -> Path:
    # Not `tempfile`: its files are private to the owner, and would stay so under the final name.
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _is_device(path: Path) -> bool:
    return path.exists() and not (path.is_file() or path.is_dir())


def _flush(folder: Path) -> None:
    """Make the file system report now whatever it would only have reported on writing back."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "r+b") as opened:  # Windows flushes only what may be written
                os.fsync(opened.fileno())


def _exchange(new: Path, target: Path, drop: Collection[str]) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    old = _sibling(target)
    with ExitStack() as undo:
        for entry in list(target.iterdir()):
            if entry.name not in drop and not os.path.lexists(new / entry.name):
                os.rename(entry, new / entry.name)
                undo.callback(os.rename, new / entry.name, entry)
        os.rename(target, old)
        undo.callback(os.rename, old, target)
        os.rename(new, target)
        undo.pop_all()
    shutil.rmtree(old, ignore_errors=True)


def _cannot_write(path: str | os.PathLike[str], error: Exception) -> BaraError:
    reason = getattr(error, "strerror", None) or error
    return BaraError(f"cannot write {path}: {reason}")


@contextmanager
def only_writer(lock: Path, refusal: str) -> Iterator[None]:
    """Keeps a second process out of the body; a process that is killed leaves no lock behind.

    What the context made for the lock, and nothing came to, is gone at its end.

    Raises:
        BaraError: another process is in the body (`refusal` says so), or the lock cannot be made.
    """
    new = [folder for folder in lock.parents if not folder.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, blocking=False)
        held.acquire()
    except Timeout:
        raise BaraError(refusal) from None
    except OSError as error:
        raise _cannot_write(lock.parent, error) from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
            for folder in new:
                folder.rmdir()
        held.release()


def require_new(folder: str | Path, overwrite: bool) -> None:
    """Refuses a folder that holds something.

    Raises:
        BaraError: it does, and `overwrite` is not set.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise BaraError(f"{path} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise BaraError(
            f"{path} exists and is not empty: give another folder, or --force (overwrite=True) to "
            "replace its files"
        )


def require_space(folder: str | Path, size: int, what: str) -> None:
    """Refuses to write more bytes than the disk of the folder has free.

    Raises:
        BaraError: there is too little space.
    """
    place = Path(os.path.realpath(folder))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise BaraError(
            f"{what} would take {size / 1e6:,.1f} MB, but the disk of {folder} has "
            f"{free / 1e6:,.1f} MB free: ask for less, or give another disk"
        )
