"""The document every benchmark writes: what its first keys are, and how it becomes a file."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
