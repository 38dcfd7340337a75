"""What a run of `prime-sample` asked for, kept beside its output, so that only the same request is continued."""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from prime_core.atomic import atomic_write
from prime_core.checkpoint import Checkpoint


class SampleFileError(ValueError):
    """The output cannot be written or continued; the message names it and the remedy."""


@contextmanager
def exclusive_file(path: Path, *, wait: bool = False) -> Iterator[BinaryIO]:
    """Open a file for appending; one process at a time.

    Args:
        path: the file; made if it is missing.
        wait: wait for another process instead of refusing.

    Raises:
        SampleFileError: its folder does not exist, or another process has the file.
    """
    if not path.parent.is_dir():
        raise SampleFileError(f"--output: the folder {path.parent} does not exist; make it first")
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise SampleFileError(f"{path}: another program is writing here; choose another output") from None
        yield file


def new_request(path: Path, request: Mapping[str, Any], seed: int | None) -> int:
    """Keep a request and return its seed, drawn if ``seed`` is None.

    Raises:
        OSError: the file cannot be written.
    """
    seed = secrets.randbits(64) if seed is None else seed
    content = json.dumps({**request, "seed": seed}, indent=2, ensure_ascii=False) + "\n"
    atomic_write(path, content.encode())
    return seed


def same_request(path: Path, output: Path, request: Mapping[str, Any], seed: int | None) -> int:
    """Compare a request with the kept one and return the kept seed.

    Args:
        path: where it was kept.
        output: what it is the request of, for messages.
        request: everything that determines the samples, but the seed.
        seed: the seed that is asked for; None takes the kept one.

    Raises:
        SampleFileError: they differ, which is said by name, or there is no kept request.
    """
    try:
        saved = read_request(path)
    except SampleFileError as error:
        raise SampleFileError(
            f"{output} exists, but {error}; choose another output, or replace it with --overwrite"
        ) from None
    kept = int(saved.pop("seed"))
    differing = [key for key in sorted({*saved, *request}) if saved.get(key) != request.get(key)]
    if seed is not None and seed != kept:
        differing.append("seed")
    if differing:
        raise SampleFileError(
            f"{output} holds samples of another request (other {', '.join(differing)}); "
            "choose another output, or replace it with --overwrite"
        )
    return kept


def read_request(path: Path) -> dict[str, Any]:
    """Return a kept request with its seed and, as "checkpoint", the digest of the weights.

    Raises:
        SampleFileError: it is missing or damaged.
    """
    try:
        saved = json.loads(path.read_text("utf-8"))
        int(saved["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        raise SampleFileError(f"{path.name}, which tells what it holds, is missing or damaged") from None
    assert isinstance(saved, dict)
    return saved


def what_made_it(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the part of a request that names the model: its weights, and the type they were computed in.

    The type is that of the loaded weights: "auto", and bfloat16 where a CPU has none, become something else elsewhere.
    """
    return {
        "checkpoint": weights_digest(checkpoint.path),
        "dtype": checkpoint.dtype_name,
    }


def weights_digest(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's weights: two checkpoints of one name are told apart."""
    with (path / "model.safetensors" if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
