"""Writing token shards so that a folder of them is complete or absent."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from prime_core import atomic
from training.data.manifest import MANIFEST_FILE, Manifest, ShardFile

_log = logging.getLogger(__name__)


class ShardWriter:
    """A stream of token ids, cut into files of `shard_tokens` each; the last may be shorter.

    Attributes:
        shards: the files written so far; complete once the context has ended.
    """

    def __init__(self, folder: Path, dtype: str, shard_tokens: int) -> None:
        """Set the writer up.

        Args:
            folder: existing, empty folder.
            dtype: "uint16" or "uint32".
            shard_tokens: tokens per file.
        """
        self.shards: list[ShardFile] = []
        self._folder = folder
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._file: IO[bytes] | None = None
        self._num_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_file()
        elif self._file is not None:
            self._file.close()

    def write(self, ids: Sequence[int]) -> None:
        """Append token ids to the stream.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        tokens = np.asarray(ids, dtype=self._dtype)
        while len(tokens) > 0:
            if self._file is None:
                self._file = (self._folder / _shard_name(len(self.shards))).open("xb")
            taken = tokens[: self._shard_tokens - self._num_tokens]
            self._file.write(taken.tobytes())
            self._num_tokens += len(taken)
            tokens = tokens[len(taken) :]
            if self._num_tokens == self._shard_tokens:
                self._finish_file()

    def _finish_file(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.shards.append(ShardFile(file=_shard_name(len(self.shards)), num_tokens=self._num_tokens))
        self._file, self._num_tokens = None, 0


@contextmanager
def exclusive_folder(target: Path) -> Iterator[Path]:
    """Hold the lock of `target` and yield an empty folder beside it, which is removed at the end.

    Raises:
        OSError: the parent folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with target.with_name(f".{target.name}.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another process is writing %s; waiting for it", target)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever holds the lock is alone: what lies here was left by a builder that was killed.
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and make it durable.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    atomic.atomic_write(folder / MANIFEST_FILE, (manifest.model_dump_json(indent=2) + "\n").encode())


def publish(partial: Path, target: Path) -> None:
    """Give a complete folder its name and make it durable.

    Args:
        partial: the folder, manifest included.
        target: its name; nothing or an empty folder may be there.

    Raises:
        OSError: renaming failed, or ``target`` is not empty; what was there is unchanged.
    """
    atomic.sync_folder(partial)
    partial.rename(target)
    atomic.sync_folder(target.parent)


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.bin"
