"""A file is replaced whole or not at all, whatever fails."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from prime_core import atomic


def test_writes_bytes_and_from_a_writer(tmp_path: Path) -> None:
    target = tmp_path / "a"
    atomic.atomic_write(target, b"one")
    assert target.read_bytes() == b"one"
    atomic.atomic_write(target, lambda file: file.writelines([b"t", b"wo"]))
    assert target.read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    target = tmp_path / "a"
    atomic.atomic_write(target, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        atomic.atomic_write(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_failing_writer_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    atomic.atomic_write(target, b"old")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.atomic_write(target, write)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_litter_of_a_crash_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a"
    atomic.partial_path(target).write_bytes(b"litter of a crash, longer than what comes next")
    atomic.atomic_write(target, b"new")
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_content_is_on_disk_before_it_gets_the_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[object] = []
    replace = os.replace

    def synced(descriptor: int) -> None:
        status = os.fstat(descriptor)
        happened.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (happened.append("replace"), replace(a, b))[1])
    for content in (b"abc", lambda file: file.write(b"abc")):
        happened.clear()
        atomic.atomic_write(tmp_path / "a", content)
        assert happened == [3, "replace", "folder"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux tells in /proc")
def test_no_file_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def num_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = num_open()
    atomic.atomic_write(tmp_path / "a", b"abc")
    assert num_open() == before
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        atomic.sync_folder(tmp_path)
    assert num_open() == before
