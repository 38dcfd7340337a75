"""CIFAR-10: 60,000 colour images of 32x32 pixels in ten classes, in the binary or the Python form.

Either form is read from the official archive, whose MD5 is checked, or from a folder that holds the archive or its
extracted files.
All of it fits into memory, so nothing is cached.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from prime_core.pictures import Pixels
from training.data.images.image_set import DataError, ImageSet, Labels
from training.data.images.planar import (
    ROW_BYTES,
    LabelRange,
    check_labels,
    read_pickled_batch,
    to_pictures,
)
from training.data.images.tar_members import read_members

LABEL_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
NUM_RECORDS = 10_000  # of every file
RECORD_BYTES = 1 + ROW_BYTES
ARCHIVE_MD5 = {
    "c32a1d4ab5d03f1284b67883e8d87530": "binary",
    "c58f30108f718f92721af3b95e74349a": "python",
}
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
# A pickled batch is its rows, 10,000 labels and as many file names.
_MAX_FILE_BYTES = {"binary": NUM_RECORDS * RECORD_BYTES, "python": 32 * 2**20}
_LABELS = LabelRange(0, len(LABEL_NAMES) - 1)
_FOLDERS = {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"}
_FILES = {
    "binary": {
        "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        "heldout": ("test_batch.bin",),
    },
    "python": {
        "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
        "heldout": ("test_batch",),
    },
}


def read_cifar10(path: Path, split: Literal["train", "heldout"], *, verify: bool = True) -> ImageSet:
    """Read one split into memory; "heldout" is the test set of 10,000 images.

    Args:
        path: cifar-10-binary.tar.gz, cifar-10-python.tar.gz, or a folder with the files of either, directly
            or in the sub-folder that the archive makes, or else with one of the archives under its own name.
        split: "train" or "heldout".
        verify: refuse an archive whose MD5 is not that of an official one, and extracted files, which have no
            checksum, without their 10,000 records each. The records themselves are checked either way.

    Returns:
        Pixels (N, 32, 32, 3) and labels 0..9.

    Raises:
        DataError: a file is missing, damaged, truncated or over-long, or is not what its name says.
    """
    batches = _from_folder(path, split, verify) if path.is_dir() else _from_archive(path, split, verify)
    pixels, labels = zip(*batches, strict=True)
    return ImageSet(f"cifar10/{split}", np.concatenate(pixels), np.concatenate(labels), LABEL_NAMES)


def _from_folder(folder: Path, split: str, verify: bool) -> Iterator[tuple[Pixels, Labels]]:
    for form, parse in _PARSERS.items():
        for place in (folder, folder / _FOLDERS[form]):
            paths = [place / name for name in _FILES[form][split]]
            if not paths[0].is_file():
                continue
            for path in paths:
                pixels, labels = parse(_read_file(path, _MAX_FILE_BYTES[form]), path)
                if verify and len(labels) != NUM_RECORDS:
                    raise DataError(
                        f"{path}: ends after record {len(labels) - 1} of {NUM_RECORDS} records; extract it again, or "
                        "set verify to false to read files of your own"
                    )
                yield pixels, labels
            return
    archive = next((folder / name for name in ARCHIVES if (folder / name).is_file()), None)
    if archive is None:
        first = ", ".join(files[split][0] for files in _FILES.values())
        raise DataError(
            f"{folder}: holds none of {first}, {', '.join(ARCHIVES)}; put one of these archives there, or its "
            "extracted files"
        )
    yield from _from_archive(archive, split, verify)


def _read_file(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; extract it again") from None
    if len(content) > limit:
        raise DataError(f"{path}: offset {limit}: trailing bytes, at most {limit} expected; extract it again")
    return content


def _from_archive(path: Path, split: str, verify: bool) -> Iterator[tuple[Pixels, Labels]]:
    forms = [_checked_form(path)] if verify else list(_PARSERS)
    names = {f"{_FOLDERS[form]}/{name}": form for form in forms for name in _FILES[form][split]}
    found = read_members(path, {name: _MAX_FILE_BYTES[form] for name, form in names.items()})
    form = next((names[name] for name in names if name in found), forms[0])
    for name in _FILES[form][split]:
        member = f"{_FOLDERS[form]}/{name}"
        if member not in found:
            raise DataError(f"{path}: holds no {member}; fetch the archive again")
        yield _PARSERS[form](found[member], path / member)


def _checked_form(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}; give {' or '.join(ARCHIVES)}, or a folder with it"
        ) from None
    if digest not in ARCHIVE_MD5:
        raise DataError(
            f"{path}: its MD5 {digest} is not that of an official CIFAR-10 archive; fetch it again, or set "
            "verify to false to read an archive of your own"
        )
    return ARCHIVE_MD5[digest]


def _parse_binary(content: bytes, path: Path) -> tuple[Pixels, Labels]:
    whole, rest = divmod(len(content), RECORD_BYTES)
    if rest or not whole:
        raise DataError(
            f"{path}: offset {len(content)}: ends inside record {whole}, records have {RECORD_BYTES} bytes; "
            "fetch the file again"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(whole, RECORD_BYTES)
    return to_pictures(records[:, 1:]), check_labels(path, records[:, 0], whole, _LABELS)


def _parse_python(content: bytes, path: Path) -> tuple[Pixels, Labels]:
    file = io.BytesIO(content)
    rows, labels = read_pickled_batch(file, path, _LABELS, NUM_RECORDS)
    return to_pictures(rows.read(file, 0, len(labels))), labels


_PARSERS: dict[str, Callable[[bytes, Path], tuple[Pixels, Labels]]] = {
    "binary": _parse_binary,
    "python": _parse_python,
}
