"""Batches of 32x32 images in .npz form: a zip archive with the arrays `data` and `labels`.

The arrays are read as streams, so neither the sizes that the zip directory claims nor the shapes that the
array headers claim decide how much memory is taken. Only arrays of whole numbers are read (`npy_header`).
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from training.data.images.image_set import DataError, Labels
from training.data.images.npy_header import Header, HeaderError, read_npy_header
from training.data.images.planar import ROW_BYTES, LabelRange, check_labels, check_rows

# What zipfile and its decompressors raise on damaged or hostile archives; OSError is bz2's, but also the disk's.
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
           struct.error, UnicodeError, LookupError, HeaderError)  # fmt: skip


def read_npz_labels(path: Path, valid: LabelRange, max_count: int) -> Labels:
    """Check the two arrays of a batch and return the labels (N,), counted from 0.

    Args:
        path: the batch.
        valid: the labels that may occur.
        max_count: largest N that the format knows.

    Raises:
        DataError: not such a batch.
    """
    with _member(path, "data") as (_, header):
        count = check_rows(path, header.dtype, header.shape, max_count)
    with _member(path, "labels") as (file, header):
        dtype, shape = header
        if shape != (count,):
            raise DataError(
                f"{path}: labels are {dtype} {shape}, not integers ({count},); fetch the official file"
            )
        content = _read(file, count * dtype.itemsize)
        _expect_end(path, "labels", file, count)
        return check_labels(path, np.frombuffer(content, dtype), count, valid)


def iter_npz_rows(path: Path, count: int, chunk: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the ``count`` rows of a batch that `read_npz_labels` has checked, (<= chunk, 3072) at a time.

    Raises:
        DataError: the file is damaged, truncated, or holds more.
    """
    with _member(path, "data") as (file, _):
        for start in range(0, count, chunk):
            rows = min(chunk, count - start)
            yield np.frombuffer(_read(file, rows * ROW_BYTES), np.uint8).reshape(rows, ROW_BYTES)
        _expect_end(path, "data", file, count)


@contextmanager
def _member(path: Path, name: str) -> Iterator[tuple[IO[bytes], Header]]:
    """Open one array of the archive behind its header; gives the stream and what the header says."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.namelist().count(f"{name}.npy") != 1:
                raise DataError(f"{path}: does not hold one array named {name}; fetch the official file")
            with archive.open(f"{name}.npy") as file:
                yield file, read_npy_header(file)
    except DataError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: {name}: damaged or refused ({reason}); fetch the official file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _expect_end(path: Path, name: str, file: IO[bytes], count: int) -> None:
    """Refuse trailing bytes. Reading to the end also lets the archive check its sum."""
    if file.read(1):
        raise DataError(f"{path}: {name}: trailing bytes after record {count - 1}; fetch the file again")


def _read(file: IO[bytes], length: int) -> bytes:
    content = file.read(length)
    if len(content) != length:
        raise EOFError(f"{length} bytes expected, {len(content)} left")
    return content
