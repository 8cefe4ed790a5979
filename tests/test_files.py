"""Whole or not at all: a full disk, a failing body, a target in the way."""

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bara.errors import BaraError
from bara.files import atomic_directory, atomic_write_bytes, atomic_write_text


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 4 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_text_is_written_and_replaced(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    atomic_write_text(path, "first")
    atomic_write_text(path, "zweites ü")
    assert path.read_bytes() == "zweites ü".encode()
    assert os.listdir(path.parent) == ["a.txt"]


def test_half_a_surrogate_pair_does_not_stop_the_writing(tmp_path):
    atomic_write_text(tmp_path / "a.txt", "broken \ud83d emoji")
    assert (tmp_path / "a.txt").read_text() == "broken ? emoji"


def test_files_are_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").write_text("x")
    atomic_write_text(tmp_path / "atomic", "x")
    with atomic_directory(tmp_path / "folder"):
        pass
    (tmp_path / "plain_folder").mkdir()
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["plain"] == modes["atomic"]
    assert modes["plain_folder"] == modes["folder"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic_write_text(pipe, "hello")
    assert os.read(reader, 100) == b"hello"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_full_disk_leaves_the_file_before(tmp_path):
    path = tmp_path / "a.bin"
    atomic_write_bytes(path, b"before")
    message = re.escape(f"cannot write {path}: File too large")
    with full_disk(), pytest.raises(BaraError, match=message):
        atomic_write_bytes(path, bytes(100_000))
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(bytes(100_000)),
        lambda file: save_file({"a": torch.zeros(50_000)}, file),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_leaves_the_folder_before(tmp_path, write):
    path = tmp_path / "adapter"
    with atomic_directory(path) as folder:
        save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    before = (path / "model.safetensors").read_bytes()
    message = re.escape(f"cannot write {path}: ") + ".*too large"
    with full_disk(), pytest.raises(BaraError, match=message), atomic_directory(path) as folder:
        write(folder / "model.safetensors")
    assert (path / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_folder_replaces_its_namesakes_and_keeps_the_rest(tmp_path):
    path = tmp_path / "run"
    (path / "adapter").mkdir(parents=True)
    (path / "adapter" / "stale").write_text("old")
    (path / "results.json").write_text("old")
    (path / "notes.txt").write_text("mine")
    with atomic_directory(path) as folder:
        (folder / "results.json").write_text("new")
        (folder / "adapter").mkdir()
        assert (path / "results.json").read_text() == "old"
    assert (path / "results.json").read_text() == "new"
    assert (path / "notes.txt").read_text() == "mine"
    assert os.listdir(path / "adapter") == []
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("x"), ValueError),
        (OSError(28, "No space left on device"), BaraError),
    ],
)
def test_any_failure_in_the_body_leaves_the_folder_before(tmp_path, error, expected):
    path = tmp_path / "run"
    path.mkdir()
    (path / "results.json").write_text("old")

    def write() -> None:
        with atomic_directory(path) as folder:
            (folder / "results.json").write_text("new")
            raise error

    with pytest.raises(expected):
        write()
    assert (path / "results.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["run"]


def test_a_failing_exchange_is_undone(tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.mkdir()
    (path / "results.json").write_text("old")
    (path / "notes.txt").write_text("mine")
    rename = os.rename

    def failing(source, target):
        if Path(target) == path and Path(source, "fresh").exists():
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)

    def write() -> None:
        with atomic_directory(path) as folder:
            (folder / "fresh").touch()

    with pytest.raises(BaraError, match="Input/output error"):
        write()
    assert sorted(os.listdir(path)) == ["notes.txt", "results.json"]
    assert os.listdir(tmp_path) == ["run"]


def test_what_cannot_be_a_folder_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BaraError, match="a file of that name"), atomic_directory(tmp_path / "file"):
        pytest.fail("the body ran")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    for folder in (".", tmp_path):
        with pytest.raises(BaraError, match="current folder"), atomic_directory(folder):
            pytest.fail("the body ran")
    with pytest.raises(BaraError, match="cannot write"):
        atomic_write_text(tmp_path / "file" / "below", "x")
    with pytest.raises(BaraError, match="directory"):
        atomic_write_text(tmp_path / "deep", "x")
