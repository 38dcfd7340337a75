"""Files that appear whole or not at all: write beside, flush to disk, rename.

A crash at any point leaves the old file or the new one. What a crash may also leave is a file named
`.NAME.partial`; the name is fixed, so the next write of the same file replaces it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

Content = bytes | Callable[[BinaryIO], None]


def partial_path(path: Path) -> Path:
    """Return where the content of ``path`` is staged: `.NAME.partial` in the same folder."""
    return path.with_name(f".{path.name}.partial")


def atomic_write(path: Path, content: Content) -> None:
    """Replace ``path`` by ``content`` so that a crash or a full disk leaves the old file or the new one.

    Args:
        path: the file; its folder must exist. Two processes must not write the same file at once.
        content: the bytes, or a function that writes them to the open file.

    Raises:
        OSError: the content could not be written; ``path`` is as it was and nothing is left beside it.
    """
    try:
        stage(path, content)
        publish(path)
    finally:
        partial_path(path).unlink(missing_ok=True)


def stage(path: Path, content: Content) -> None:
    """Write ``content`` to `partial_path(path)` and flush it to disk.

    Raises:
        OSError: the content could not be written; the caller removes the partial file.
    """
    with open_partial(path) as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def publish(path: Path) -> None:
    """Rename the staged content of ``path`` into place and make the rename durable.

    Raises:
        OSError: the rename failed; ``path`` is as it was.
    """
    os.replace(partial_path(path), path)  # noqa: PTH105 - the one commit point, spelled as the system call
    sync_folder(path.parent)


def open_partial(path: Path) -> BinaryIO:
    """Open the partial file of ``path`` for writing, emptied."""
    return partial_path(path).open("wb")


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
