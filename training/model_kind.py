"""Which settings a command has: it looks at the checkpoint first, for text and images have different ones."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path

from prime_core.checkpoint import CheckpointError, read_config
from prime_core.config import UNetConfig


def makes_images(arguments: Sequence[str], prefix: str) -> bool:
    """Return whether the checkpoint that a command line names is an image model.

    The checkpoint is looked for where `load_settings` looks for settings, in the same order: flags, environment,
    the file of --config. What cannot be read counts as text; the command then says what is wrong with it.

    Args:
        arguments: the command line without the program's name.
        prefix: of the command's environment variables.
    """
    path = _setting("checkpoint", arguments, prefix)
    if path is None:
        file = _setting("config", arguments, prefix)
        path = None if file is None else _from_file(Path(file))
    if path is None:
        return False
    try:
        return isinstance(read_config(path).model, UNetConfig)
    except (CheckpointError, OSError):
        return False


def _setting(name: str, arguments: Sequence[str], prefix: str) -> str | None:
    found = os.environ.get(f"{prefix}{name.upper()}")
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == f"--{name}" and following is not None:
            found = following
        elif argument.startswith(f"--{name}="):
            found = argument.partition("=")[2]
    return found


def _from_file(file: Path) -> str | None:
    try:
        value = tomllib.loads(file.read_text("utf-8")).get("checkpoint")
    except (OSError, ValueError):
        return None
    return value if isinstance(value, str) else None
