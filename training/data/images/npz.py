"""Batches of 32x32 images in .npz form: a zip archive with the arrays `data` and `labels`.

The arrays are read as streams, so neither the sizes that the zip directory claims nor the shapes that the
array headers claim decide how much memory is taken. No array of objects is ever loaded.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from training.data.images.image_set import DataError, Labels
from training.data.images.planar import ROW_BYTES, LabelRange, check_labels, check_rows

_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)


def read_npz_labels(path: Path, valid: LabelRange, max_count: int) -> Labels:
    """Check the two arrays of a batch and return the labels (N,), counted from 0.

    Args:
        path: the batch.
        valid: the labels that may occur.
        max_count: largest N that the format knows.

    Raises:
        DataError: not such a batch.
    """
    with _member(path, "data") as (_, dtype, shape):
        count = check_rows(path, dtype, shape, max_count)
    with _member(path, "labels") as (file, dtype, shape):
        if dtype.kind not in "iu" or shape != (count,):
            raise DataError(
                f"{path}: labels are {dtype} {shape}, not integers ({count},); fetch the official file"
            )
        content = _read(file, count * dtype.itemsize)
        return check_labels(path, np.frombuffer(content, dtype), count, valid)


def iter_npz_rows(path: Path, count: int, chunk: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the ``count`` rows of a batch that `read_npz_labels` has checked, (<= chunk, 3072) at a time.

    Raises:
        DataError: the file is damaged, truncated, or holds more.
    """
    with _member(path, "data") as (file, _, _):
        for start in range(0, count, chunk):
            rows = min(chunk, count - start)
            yield np.frombuffer(_read(file, rows * ROW_BYTES), np.uint8).reshape(rows, ROW_BYTES)
        # Reading to the end also lets the archive check its sum.
        if file.read(1):
            raise DataError(f"{path}: data: trailing bytes after record {count - 1}; fetch the file again")


@contextmanager
def _member(path: Path, name: str) -> Iterator[tuple[IO[bytes], np.dtype[Any], tuple[int, ...]]]:
    """Open one array of the archive behind its header; gives the stream, the element type and the shape."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.namelist().count(f"{name}.npy") != 1:
                raise DataError(f"{path}: does not hold one array named {name}; fetch the official file")
            with archive.open(f"{name}.npy") as file:
                # Later versions announce the length of the header in 32 bits and numpy reads it at once.
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"version {version} of the array format, only (1, 0) is read")
                shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
                if is_fortran and len(shape) > 1:
                    raise ValueError("the array is not stored row by row")
                if dtype.hasobject:
                    raise ValueError("an array of objects, which is refused")
                yield file, dtype, shape
    except DataError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: {name}: damaged or refused ({reason}); fetch the official file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read(file: IO[bytes], length: int) -> bytes:
    content = file.read(length)
    if len(content) != length:
        raise EOFError(f"{length} bytes expected, {len(content)} left")
    return content
