"""Opens foreign PyTorch zip checkpoints: checks the archive, then reads its pickle without obeying it."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from prime_core.published.program import MAX_PICKLE_BYTES, check_program
from prime_core.published.unpickler import Unpickler
from prime_core.weights import CheckpointError

MAX_ENTRIES = 200_000
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# What `zipfile` raises on damaged archives, and what running a damaged or hostile pickle program raises.
_DAMAGE = (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ArithmeticError, struct.error)
_FAULTS = (
    pickle.PickleError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextmanager
def open_archive(path: Path) -> Iterator[dict[Any, Any]]:
    """Open a PyTorch zip checkpoint and give its top-level dictionary.

    Args:
        path: the file.

    Yields:
        The dictionary: plain containers and scalars, `ArchiveTensor` for tensors (they can be read until the
        context ends), `InertRecord` for everything else.

    Raises:
        CheckpointError: missing, not such an archive, damaged, over the limits, or not a dictionary.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            start = file.read(len(_LEGACY_MAGIC))
            if not start.startswith(b"PK"):
                kind = (
                    "in the old PyTorch format" if start == _LEGACY_MAGIC else "not a PyTorch zip checkpoint"
                )
                raise CheckpointError(
                    f"{path}: this file is {kind}; save it again with torch.save (torch >= 1.6)"
                )
            archive = stack.enter_context(zipfile.ZipFile(file))
            content = _unpickle(path, archive)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except _DAMAGE as error:
            raise CheckpointError(
                f"{path}: damaged zip archive ({_short(error)}); fetch the file again"
            ) from None
        yield content


def _unpickle(path: Path, archive: zipfile.ZipFile) -> dict[Any, Any]:
    root = _check_entries(path, archive)
    program = archive.read(f"{root}/data.pkl")
    try:
        check_program(program)
        content = Unpickler(program, archive, root).load()
    except _FAULTS as error:
        raise CheckpointError(
            f"{path}: its pickle is refused: {_short(error)}; it is damaged or hostile"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__} instead of a dictionary; not a checkpoint"
        )
    return content


def _check_entries(path: Path, archive: zipfile.ZipFile) -> str:
    """Check names, storage method and sizes of all entries; return the folder that holds data.pkl."""
    entries = archive.infolist()
    names = {entry.filename for entry in entries}
    if len(names) != len(entries) or len(entries) > MAX_ENTRIES:
        raise CheckpointError(f"{path}: {len(entries)} entries, some twice or over {MAX_ENTRIES}: refused")
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or "\0" in entry.orig_filename:
            raise CheckpointError(f"{path}: entry {name[:80]!r} leaves the archive: refused")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"{path}: entry {name[:80]!r} is compressed; PyTorch compresses nothing")
        if entry.flag_bits & 0x1:
            raise CheckpointError(f"{path}: entry {name[:80]!r} is encrypted: refused")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path}: the entries claim more bytes than the file has: damaged or hostile")
    roots = [
        name.removesuffix("/data.pkl")
        for name in names
        if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: a PyTorch checkpoint has one NAME/data.pkl, found {len(roots)}")
    if archive.getinfo(f"{roots[0]}/data.pkl").file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: data.pkl is larger than {MAX_PICKLE_BYTES} bytes: refused")
    if f"{roots[0]}/byteorder" in names and archive.read(f"{roots[0]}/byteorder")[:16] != b"little":
        raise CheckpointError(f"{path}: written on a big-endian machine, which is not supported")
    return roots[0]


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
