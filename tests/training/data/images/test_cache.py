"""The cache of converted images: complete or absent, whatever ends a conversion, and never stale."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from prime_core import atomic
from training.data.images import DataError
from training.data.images.cache import Chunk, Conversion, open_cached

PIXELS = np.arange(6 * 2 * 2 * 3, dtype=np.uint8).reshape(6, 2, 2, 3)
LABELS = np.array([5, 0, 1, 2, 3, 4])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"as it was")
    return path


def _chunks(labelled: bool = True) -> Iterator[Chunk]:
    for start in range(0, 6, 2):
        part = slice(start, start + 2)
        yield PIXELS[part], LABELS[part] if labelled else None


def _conversion(
    source: Path, chunks: Callable[[], Iterator[Chunk]] = _chunks, labelled: bool = True
) -> Conversion:
    return Conversion(
        name="set-train",
        sources=[("source", source)],
        recipe={},
        picture_shape=(2, 2, 3),
        labelled=labelled,
        convert=lambda: (6, chunks()),
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_gives_what_was_converted_and_converts_once(tmp_path: Path, source: Path, labelled: bool) -> None:
    calls = 0

    def counted() -> Iterator[Chunk]:
        nonlocal calls
        calls += 1
        return _chunks(labelled)

    for _ in range(2):
        pixels, labels = open_cached(tmp_path / "a" / "cache", _conversion(source, counted, labelled))
        assert np.array_equal(pixels, PIXELS) and isinstance(pixels, np.memmap)
        assert (labels is None) == (not labelled) and (labels is None or np.array_equal(labels, LABELS))
    assert calls == 1
    (file,) = (tmp_path / "a" / "cache").iterdir()
    assert file.name.startswith("set-train-") and file.suffix == ".npy"


def test_a_changed_source_is_converted_again(tmp_path: Path, source: Path) -> None:
    name = _conversion(source).file_name()
    assert _conversion(source).file_name() == name
    os.utime(source, ns=(0, source.stat().st_mtime_ns + 1))
    touched = _conversion(source).file_name()
    source.write_bytes(b"as it is now")
    os.utime(source, ns=(0, 1))
    assert len({name, touched, _conversion(source).file_name()}) == 3
    assert _conversion(source, labelled=False).file_name() != _conversion(source).file_name()


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path, source: Path) -> None:
    def changing() -> Iterator[Chunk]:
        source.write_bytes(b"something else")
        yield from _chunks()

    with pytest.raises(DataError, match="set-train: the files changed while they were read"):
        open_cached(tmp_path / "cache", _conversion(source, changing))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("error", [DataError("bad"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(tmp_path: Path, source: Path, error: BaseException) -> None:
    def failing() -> Iterator[Chunk]:
        yield next(_chunks())
        raise error

    with pytest.raises(type(error)):
        open_cached(tmp_path / "cache", _conversion(source, failing))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failing_system_call_leaves_nothing(
    tmp_path: Path, source: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "failed")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="failed"):
        open_cached(tmp_path / "cache", _conversion(source))
    assert not list((tmp_path / "cache").iterdir())


# The child runs no code that another thread could hold a lock of.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("moment", ["convert", "fsync", "replace"])
def test_a_killed_conversion_leaves_no_cached_file(tmp_path: Path, source: Path, moment: str) -> None:
    """A process that is killed in the middle, with kill -9; the next one converts as if nothing had been."""
    cache = tmp_path / "cache"
    child = os.fork()
    if child == 0:
        try:
            _convert_and_die(cache, source, moment)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    (left,) = cache.iterdir()
    assert left == atomic.partial_path(cache / _conversion(source).file_name())
    pixels, _ = open_cached(cache, _conversion(source))
    assert np.array_equal(pixels, PIXELS)
    assert [path.name for path in cache.iterdir()] == [_conversion(source).file_name()]


def _convert_and_die(cache: Path, source: Path, moment: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def chunks() -> Iterator[Chunk]:
        yield next(_chunks())
        if moment == "convert":
            die()
        yield from list(_chunks())[1:]

    if moment != "convert":
        setattr(os, moment, die)
    open_cached(cache, _conversion(source, chunks))


def test_two_converters_do_not_disturb_each_other(tmp_path: Path, source: Path) -> None:
    """The second one waits for the first, and then finds the file made."""
    begun, proceed = threading.Event(), threading.Event()
    calls: list[str] = []

    def slow() -> Iterator[Chunk]:
        calls.append("slow")
        begun.set()
        assert proceed.wait(20)
        yield from _chunks()

    def second() -> Iterator[Chunk]:
        calls.append("second")
        return _chunks()

    cache = tmp_path / "cache"
    found: list[bool] = []

    def run(chunks: Callable[[], Iterator[Chunk]]) -> None:
        pixels, _ = open_cached(cache, _conversion(source, chunks))
        found.append(np.array_equal(pixels, PIXELS))

    threads = [threading.Thread(target=run, args=(chunks,)) for chunks in (slow, second)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive() and found == []
    proceed.set()
    for thread in threads:
        thread.join(20)
    assert calls == ["slow"] and found == [True, True]
    assert len(list(cache.iterdir())) == 1


def test_the_second_converter_takes_over_when_the_first_fails(tmp_path: Path, source: Path) -> None:
    begun, proceed = threading.Event(), threading.Event()
    failures: list[DataError] = []

    def failing() -> Iterator[Chunk]:
        begun.set()
        assert proceed.wait(20)
        yield next(_chunks())
        raise DataError("bad")

    def run() -> None:
        try:
            open_cached(tmp_path / "cache", _conversion(source, failing))
        except DataError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(20)
    threading.Timer(0.1, proceed.set).start()
    pixels, _ = open_cached(tmp_path / "cache", _conversion(source))
    thread.join(20)
    assert len(failures) == 1 and np.array_equal(pixels, PIXELS)


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: c + b"x", lambda c: b"", lambda c: c.replace(b"u1", b"i1")]
)
def test_a_damaged_cached_file_is_named(
    tmp_path: Path, source: Path, damage: Callable[[bytes], bytes]
) -> None:
    open_cached(tmp_path / "cache", _conversion(source))
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"damaged cache .*; remove the file, it is made again") as caught:
        open_cached(tmp_path / "cache", _conversion(source))
    assert str(caught.value).startswith(str(path))


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing: cannot be read: No such file"):
        open_cached(tmp_path / "cache", _conversion(tmp_path / "nothing"))
    assert not (tmp_path / "cache").exists()
