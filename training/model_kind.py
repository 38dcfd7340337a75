"""Which settings a command has: it looks at the checkpoint first, for text and images have different ones."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from prime_core.checkpoint import CheckpointError, read_config
from prime_core.config import Config, UNetConfig


def makes_images(arguments: Sequence[str], prefix: str) -> bool:
    """Return whether the checkpoint that a command line names is an image model.

    The checkpoint is looked for where `load_settings` looks for settings, in the same order: flags, environment,
    the file of --config. What cannot be read counts as text; the command then says what is wrong with it.

    Args:
        arguments: the command line without the program's name.
        prefix: of the command's environment variables.
    """
    config = _config(arguments, prefix)
    return config is not None and isinstance(config.model, UNetConfig)


def is_toy(arguments: Sequence[str], prefix: str) -> bool:
    """Return whether the checkpoint that a command line names was trained on data.kind "toy2d"; see `makes_images`."""
    config = _config(arguments, prefix)
    training = None if config is None else config.provenance.get("training")
    data = training.get("data") if isinstance(training, Mapping) else None
    return isinstance(data, Mapping) and data.get("kind") == "toy2d"


def _config(arguments: Sequence[str], prefix: str) -> Config | None:
    path = _setting("checkpoint", arguments, prefix)
    if path is None:
        file = _setting("config", arguments, prefix)
        path = None if file is None else _from_file(Path(file))
    try:
        return None if path is None else read_config(path)
    except (CheckpointError, OSError):
        return None


def _setting(name: str, arguments: Sequence[str], prefix: str) -> str | None:
    found = os.environ.get(f"{prefix}{name.upper()}")
    for argument, following in zip(arguments, [*arguments, None][1:], strict=True):
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
