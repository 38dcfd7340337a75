"""Weights on disk: safetensors files, read with every claim of the header checked before a tensor is made.

Format: 8 bytes little-endian header length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then the
tensors without gaps. Reading goes through one open file, so a file that is replaced meanwhile is never mixed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
_METADATA = "__metadata__"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (a PyTorch pickle checkpoint)",
    b"\x80": "a pickle",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip file",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer (the real file was not fetched)",
}


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names the file, the fault and the remedy."""


class TensorEntry(NamedTuple):
    """One tensor of a weights file: where it lies (bytes from the start of the file) and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class WeightsFile:
    """An open weights file whose header has been checked.

    Attributes:
        path: the file.
        metadata: the strings stored beside the tensors.
        tensors: name to entry.
    """

    def __init__(self, path: Path, file: BufferedReader) -> None:
        """Read and check the header; see `open_weights`."""
        self.path = path
        self._file = file
        self.metadata, self.tensors = _read_header(path, file)

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU.

        Raises:
            CheckpointError: the file ended early.
        """
        entry = self.tensors[name]
        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        self._file.seek(entry.start)
        if self._file.readinto(raw.numpy().data) != len(raw):
            raise CheckpointError(f"{self.path}: ended inside tensor {name!r}; copy the file again")
        return raw.view(entry.dtype).reshape(entry.shape)


@contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """Open a safetensors file after looking at its first bytes; nothing else is ever opened.

    Raises:
        CheckpointError: missing, unreadable, not safetensors (whatever its name), damaged, or over the limits
            (header 16 MiB, 100,000 tensors).
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; a checkpoint folder holds model.safetensors and config.json"
        )
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from None
    with file:
        yield WeightsFile(path, file)


def write_weights(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as one safetensors file, one tensor at a time (no second copy of the model in memory).

    Args:
        file: where to write.
        tensors: name to tensor, any device; dtypes that safetensors knows.
        metadata: strings to store beside them.

    Raises:
        OSError: the disk is full or the file cannot be written.
    """
    # Widest elements first keeps every tensor aligned to its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object, refusing duplicate keys at any depth.

    Args:
        text: UTF-8 JSON.
        where: what to name in messages.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, nested too deeply, or a key appears twice.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: not valid JSON: {str(error)[:200]}; fetch or write it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must be a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key[:100]!r} appears twice")
        result[key] = value
    return result


def _read_header(path: Path, file: BufferedReader) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(64)
    if not start:
        raise CheckpointError(f"{path}: the file is empty; copy or save it again")
    for magic, what in _FOREIGN.items():
        if start.startswith(magic) and start[8:9] != b"{":
            raise CheckpointError(
                f"{path}: this is {what}, not safetensors: refused unopened; "
                "convert a published checkpoint with prime-import"
            )
    length = int.from_bytes(start[:8], "little")
    if len(start) > 8 and start[8:9] != b"{":
        raise CheckpointError(f"{path}: this is not a safetensors file: refused unopened; see prime-import")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header of {length} bytes, at most {MAX_HEADER_BYTES}: not a usable file"
        )
    if len(start) <= 8 or 8 + length > size:
        raise CheckpointError(f"{path}: truncated inside the header ({size} bytes); copy the file again")
    file.seek(8)
    header = parse_json_object(file.read(length), f"{path}, header")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header {_METADATA} must map strings to strings")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: {len(header)} tensors, at most {MAX_TENSORS}: not a usable file")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return metadata, entries


def _entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header must give dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where}: dtype {str(dtype)[:40]!r} is not one of {', '.join(_DTYPES)}")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise CheckpointError(f"{where}: {field} must be a list of non-negative integers")
    num_bytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes or len(shape) > 16:
        raise CheckpointError(
            f"{where}: data_offsets {offsets[:2]} do not hold shape {shape[:16]} of {dtype}"
        )
    return TensorEntry(_DTYPES[dtype], tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_layout(path: Path, entries: Mapping[str, TensorEntry], position: int, size: int) -> None:
    """Check that the tensors fill the file from ``position`` to ``size`` without gap or overlap."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            fault = "overlaps another tensor" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {name[:200]!r} {fault}; the file is damaged, fetch it again"
            )
        position = entry.end
    if size < position:
        raise CheckpointError(f"{path}: truncated: {size} bytes instead of {position}; copy the file again")
    if size > position:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor; the file is damaged")
