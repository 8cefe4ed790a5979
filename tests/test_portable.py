"""What only one system has is not assumed: the sources are read for it, and what differs is tried.

This is no run on macOS or Windows; docs/install.md says what was run.
"""

import ast
import io
import os
import sys

import pytest

from bara.cli import terminal
from bara.cli.terminal import say_next, use_utf8
from bara.files import atomic_directory
from test_architecture import FILES

UNIX_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
UNIX_NAMES = {
    "os": {"fork", "getuid", "getloadavg", "killpg", "mkfifo", "sched_getaffinity", "setsid"},
    "signal": {"SIGKILL", "SIGHUP", "SIGALRM", "SIGXFSZ", "alarm"},
}
LINUX_PLACES = ("/dev/shm", "/proc/", "/sys/", "/tmp")
GUARDED = {
    ("bara.bench.cell", "resource"),  # in a try; None where it is missing
    ("bara.cli.bench", "os.sched_getaffinity"),  # behind hasattr
}


def assumptions(module):
    """What a file of the package uses that not every system has."""
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (n.name for n in names if n.name.partition(".")[0] in UNIX_MODULES)
            case ast.ImportFrom(module=str(name)) if name.partition(".")[0] in UNIX_MODULES:
                yield name
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                if name in UNIX_NAMES.get(owner, ()):
                    yield f"{owner}.{name}"
            case ast.Constant(value=str(text)) if text.startswith(LINUX_PLACES):
                yield text


def test_the_sources_assume_no_system():
    found = {(module, what) for module in FILES for what in assumptions(module)}
    assert found == GUARDED


def test_text_files_name_their_encoding():
    """The default is the region's on Windows."""
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("read_text", "write_text"):
                given = [*node.args, *(k.value for k in node.keywords)]
                named = any(isinstance(a, ast.Constant) and a.value == "utf-8" for a in given)
                assert named, f"{module}, line {node.lineno}"


def test_pipes_hold_utf8_whatever_the_region(monkeypatch):
    coming, going = (io.TextIOWrapper(io.BytesIO(b), "cp1252") for b in ("ж\n".encode(), b""))
    monkeypatch.setattr(sys, "stdin", coming)
    monkeypatch.setattr(sys, "stdout", going)
    use_utf8()
    going.write(coming.read())
    going.flush()
    assert going.buffer.getvalue() == "ж\n".encode()


def test_windows_quotes_otherwise(monkeypatch, capsys):
    monkeypatch.setattr(terminal.os, "name", "nt")
    say_next(["bara", "predict", "my adapter"])
    monkeypatch.undo()
    assert capsys.readouterr().out == 'Next:\n  bara predict "my adapter"\n'


def test_flushing_asks_for_the_right_to_write(tmp_path, monkeypatch):
    """Windows refuses to flush a file that was opened to read."""
    fsync, writable = os.fsync, []

    def flush(descriptor):
        writable.append(os.write(descriptor, b"") == 0)  # an error if it may not be written
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    with atomic_directory(tmp_path / "new") as folder:
        (folder / "file").write_text("text", "utf-8")
    assert writable == [True]
    assert (tmp_path / "new" / "file").read_text("utf-8") == "text"
    with pytest.raises(OSError, match="Bad file descriptor"), open(tmp_path / "new/file") as file:
        os.write(file.fileno(), b"x")
