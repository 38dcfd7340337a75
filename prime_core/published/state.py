"""Reads the weights of a foreign network: a file of `torch.save` that holds tensors by name and nothing else.

Only for files that a user names for an evaluation; the server and the importer never come here. torch's own
reader of plain tensors is used because such files are often in the format from before torch 1.6, which
`published_archive` does not read. It refuses every other object, but is no sandbox: compare the digest, which
`file_digest` gives, with the one that the publisher states.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from prime_core.weights import CheckpointError

MAX_BYTES = 2**30
# Of batch norms; some versions of torch store it, and inference needs it not.
_COUNTER = ".num_batches_tracked"
_FAULTS = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError,
           AttributeError, OSError)  # fmt: skip


def read_state(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the tensors of a file, which must be exactly those that are expected.

    Args:
        path: a file of `torch.save`.
        shapes: name to shape of every tensor.

    Returns:
        name to tensor, float32 on the CPU, in the order of ``shapes``.

    Raises:
        CheckpointError: missing, too large, damaged, holding anything but tensors, or other tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_BYTES} bytes, so not the weights that are meant")
    try:
        with warnings.catch_warnings():
            # About pickle protocols, on the way to refusing them.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _FAULTS as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not a file of plain tensors, refused ({reason})") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__} instead of tensors by name")
    found = {name: value for name, value in content.items() if not str(name).endswith(_COUNTER)}
    for name in [*shapes, *found]:
        value = found.get(name)
        if name not in shapes or not isinstance(value, Tensor) or tuple(value.shape) != shapes[name]:
            got = tuple(value.shape) if isinstance(value, Tensor) else "no tensor"
            raise CheckpointError(
                f"{path}: {str(name)[:100]!r} must be {shapes.get(name, 'absent')}, but is {got}: the file belongs to "
                "another network"
            )
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise CheckpointError(f"{path}: {name!r} holds no finite floating-point numbers")
    return {name: found[name].float() for name in shapes}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
