"""Which checkpoints to serve, and under which names: the value of --model in all its spellings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

MAX_NAME_CHARS = 128
DEMO_FOLDER = Path(__file__).resolve().parent / "demo"
DEMOS = ("text", "images")
TRAINED = "checkpoint"  # where training puts its result, in the folder of each run


class ModelSource(NamedTuple):
    """A checkpoint to serve.

    Attributes:
        name: in requests and answers.
        path: a folder or one .safetensors file.
    """

    name: str
    path: Path


def demo_models() -> tuple[ModelSource, ...]:
    """Return the bundled models that are there."""
    folders = [DEMO_FOLDER / name for name in DEMOS]
    return tuple(
        ModelSource(folder.name, folder) for folder in folders if (folder / "model.safetensors").is_file()
    )


def parse_models(value: object) -> tuple[ModelSource, ...]:
    """Return the models that a setting names.

    Args:
        value: one text (a JSON list, or parts between commas), a path, or a list of parts. A part is PATH or
            NAME=PATH; a name holds no slash, so a path with an equals sign in its first folder is written ./a=b.

    Raises:
        ValueError: if a part is empty or a name is too long, not printable or given twice.
    """
    sources = tuple(_parse_part(part) for part in _parts(value))
    if not sources:
        raise ValueError("must name at least one checkpoint: PATH or NAME=PATH")
    names = [source.name for source in sources]
    for name in names:
        if not 1 <= len(name) <= MAX_NAME_CHARS or not name.isprintable():
            raise ValueError(f"names of models must be 1 to {MAX_NAME_CHARS} printable characters")
        if names.count(name) > 1:
            raise ValueError(f"two models are named {name!r}; give each a name of its own: NAME=PATH")
    return sources


def _parts(value: object) -> Sequence[object]:
    if isinstance(value, Path | ModelSource):
        return [value]
    if not isinstance(value, str):
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return value
        raise ValueError("must be PATH, NAME=PATH or a list of them")
    if not value.lstrip().startswith("["):
        return [part.strip() for part in value.split(",")]
    try:
        parsed = json.loads(value)
    except ValueError:
        raise ValueError('begins like a JSON list but is none; write ["PATH", "NAME=PATH"]') from None
    assert isinstance(parsed, list)
    return parsed


def _parse_part(part: object) -> ModelSource:
    if isinstance(part, ModelSource):
        return part
    if isinstance(part, Path):
        return ModelSource(_name_of(part), part)
    if not isinstance(part, str) or not part:
        raise ValueError("each model must be PATH or NAME=PATH")
    name, equals, path = part.partition("=")
    if not equals or "/" in name:
        return ModelSource(_name_of(Path(part)), Path(part))
    if not name or not path:
        raise ValueError("in NAME=PATH neither part may be empty")
    return ModelSource(name, Path(path))


def _name_of(path: Path) -> str:
    """Return the name of a file or folder, or of the run that a folder called "checkpoint" is of."""
    path = path.resolve()
    named = path.parent if path.name == TRAINED and path.parent.name else path
    return named.name.removesuffix(".safetensors")
