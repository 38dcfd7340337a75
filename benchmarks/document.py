"""The document every benchmark writes: what its first keys are, and how it becomes a file."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.commit import git_commit
from benchmarks.machine import describe_machine, describe_versions
from benchmarks.settings import BenchSettings

SCHEMA_VERSION = 2


def document_head(benchmark: str, settings: BenchSettings) -> dict[str, Any]:
    """Return what identifies a result: benchmark, date, commit, machine with its device, versions, settings."""
    return {
        "benchmark": benchmark,
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit() if settings.commit is None else settings.commit,
        "machine": describe_machine(settings.torch_device),
        "versions": describe_versions(),
        "settings": settings.model_dump(mode="json"),
    }


class _Ended(BaseException):
    """The time of a benchmark is over. No fault of an op, which others are caught as."""


@contextmanager
def kept_if_ended(document: dict[str, Any], results: Sequence[object]) -> Iterator[None]:
    """Let SIGTERM or a fault end a block that appends to ``results``: what is there by then is the result.

    Args:
        document: is told so, by a key ``ended_early`` or, of a fault such as memory that ran out, ``failed``.
        results: without any the process ends, or the fault is raised, as it would be without this.
    """

    def end(number: int, frame: object) -> NoReturn:
        raise _Ended

    main_thread = threading.current_thread() is threading.main_thread()  # handlers are for that one alone
    before = signal.signal(signal.SIGTERM, end) if main_thread else None
    try:
        yield
    except _Ended:
        if not results:
            raise SystemExit(128 + signal.SIGTERM) from None
        document["ended_early"] = True
    except (RuntimeError, MemoryError) as error:
        if not results:
            raise
        document["failed"] = str(error) or type(error).__name__
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def to_json(document: dict[str, Any]) -> str:
    """Return the document as JSON text, refusing NaN and infinity."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write the document to a file whole or not at all.

    Raises:
        OSError: if the file cannot be written.
    """
    write_whole(path, to_json(document))


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        OSError: if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
