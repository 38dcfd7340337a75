"""Converted copies of large data sets: one memory-mapped file per split, complete or absent.

A cached split is one .npy file of records (pixels, and the label where there are labels). Its name contains a
digest of what it was made from, so a changed source makes another file and an old one is never mistaken for
it. Files that are no longer wanted can be removed at any time.

A conversion writes to `.NAME.partial`, which is locked, flushed and renamed. A killed conversion leaves at
most that partial file; it is never read, and the next conversion of the same images writes over it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from prime_core import atomic
from prime_core.pictures import Pixels
from training.data.images.image_set import DataError, Labels
from training.progress import progress_bar

FORMAT_VERSION = 1
# Pixels (n, H, W, C) uint8 of some images, and their labels (n,) int64 or None.
Chunk = tuple[Pixels, Labels | None]


@dataclass(frozen=True)
class Conversion:
    """How one split is made from its sources.

    Attributes:
        name: the split, as a file name such as "imagenet32-train".
        sources: (name, file) in order. The digest sees names, sizes and times of change.
        recipe: JSON values that decide, besides the sources, what is made.
        picture_shape: (H, W, C) of each image.
        labelled: whether the images have labels.
        convert: looks at the sources and gives the number of images and an iterator over them, some at a
            time. Called only where there is no cached file.
    """

    name: str
    sources: Sequence[tuple[str, Path]]
    recipe: Mapping[str, object]
    picture_shape: tuple[int, int, int]
    labelled: bool
    convert: Callable[[], tuple[int, Iterable[Chunk]]]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of one record of the cached file."""
        fields: list[Any] = [("pixels", "u1", self.picture_shape)]
        return np.dtype(fields + [("label", "<i4")] if self.labelled else fields)

    def file_name(self) -> str:
        """Return the name of the cached file.

        Raises:
            DataError: a source cannot be looked at.
        """
        facts: list[object] = [FORMAT_VERSION, self.picture_shape, self.labelled, dict(self.recipe)]
        for name, path in self.sources:
            try:
                status = path.stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
            facts.append([name, status.st_size, status.st_mtime_ns])
        return f"{self.name}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.npy"


def open_cached(cache: Path, conversion: Conversion) -> tuple[Pixels, Labels | None]:
    """Open a cached split, converting it first where it is not there.

    Args:
        cache: folder of converted copies; made when needed.
        conversion: what the split is made from.

    Returns:
        Pixels (N, H, W, C) uint8, memory-mapped and read-only, and labels (N,) int64 or None.

    Raises:
        DataError: the sources are refused or change meanwhile, or the cached file is damaged. Nothing
            half-made is left.
        OSError: the disk is full or the folder cannot be written; likewise.
    """
    path = cache / conversion.file_name()
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with _partial_file(path) as file:
            if file is not None:
                _write(file, conversion)
                if conversion.file_name() != path.name:
                    raise DataError(f"{conversion.name}: the files changed while they were read; try again")
                atomic.publish(path)
    return _open(path, conversion)


@contextmanager
def _partial_file(path: Path) -> Iterator[BinaryIO | None]:
    """Hold the partial file of ``path``, emptied; None where another process has made ``path`` meanwhile.

    The lock is on the file itself, which is renamed or removed before the lock is given back. A process that
    waited for it then holds a file without that name, and looks again.
    """
    partial = atomic.partial_path(path)
    while not path.is_file():
        with partial.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_still(partial, file):
                continue
            try:
                if path.is_file():
                    continue
                file.truncate(0)
                yield file
                return
            finally:
                if _is_still(partial, file):
                    partial.unlink()
    yield None


def _is_still(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _write(file: BinaryIO, conversion: Conversion) -> None:
    count, chunks = conversion.convert()
    descr = np.lib.format.dtype_to_descr(conversion.dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})
    written = 0
    with progress_bar(total=count, unit="image", desc=f"converting {conversion.name}", shown=None) as bar:
        for pixels, labels in chunks:
            records = np.empty(len(pixels), conversion.dtype)
            records["pixels"] = pixels
            if labels is not None:
                records["label"] = labels
            file.write(records.tobytes())
            written += len(pixels)
            bar.update(len(pixels))
    assert written == count, "a conversion gives as many images as it announces"
    file.flush()
    os.fsync(file.fileno())


def _open(path: Path, conversion: Conversion) -> tuple[Pixels, Labels | None]:
    try:
        records = np.lib.format.open_memmap(path, mode="r")
        is_whole = path.stat().st_size == records.offset + records.nbytes
        if not is_whole or records.dtype != conversion.dtype or records.ndim != 1:
            raise ValueError(f"{records.dtype} {records.shape}")
    except (ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged cache ({error}); remove the file, it is made again") from None
    return records["pixels"], records["label"].astype(np.int64) if conversion.labelled else None
