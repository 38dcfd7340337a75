"""Reads the header of an array in numpy's .npy format without numpy's own reader.

That reader takes headers of Python 2 with a warning, tokenises what it does not understand and lets through
whatever Python raises on the way. Of the format this takes: versions 1.0, 2.0 and 3.0, a header of at most
`MAX_HEADER_BYTES` of ASCII text that is a dictionary of exactly three keys, and whole numbers or bytes.
"""

from __future__ import annotations

import ast
import struct
from typing import IO, Any, NamedTuple

import numpy as np

MAX_HEADER_BYTES = 1024  # numpy writes at most 128 for what is read here
MAX_DIMENSIONS = 8
_MAGIC = b"\x93NUMPY"
# Length of the length of the header, by version.
_LENGTHS = {(1, 0): "<H", (2, 0): "<I", (3, 0): "<I"}
_KEYS = {"descr", "fortran_order", "shape"}
_TYPES = frozenset(
    [f"|{kind}1" for kind in "iu"]
    + [f"{order}{kind}{size}" for order in "<>" for kind in "iu" for size in (2, 4, 8)]
)


class HeaderError(ValueError):
    """Not a header of an array of whole numbers; the message says why in a few words."""


class Header(NamedTuple):
    """What a header says of its array: the type of an element, and the sizes, stored row by row."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def read_npy_header(file: IO[bytes]) -> Header:
    """Read a header; the stream then stands at the first element.

    Raises:
        HeaderError: damaged, of another version, not row by row, or of other elements than whole numbers.
    """
    start = file.read(len(_MAGIC) + 2)
    if len(start) < len(_MAGIC) + 2 or not start.startswith(_MAGIC):
        raise HeaderError("not an array in numpy's format")
    version = (start[-2], start[-1])
    if version not in _LENGTHS:
        raise HeaderError(f"version {version} of the array format, only (1, 0), (2, 0) and (3, 0) are read")
    size = struct.calcsize(_LENGTHS[version])
    length_bytes = file.read(size)
    if len(length_bytes) < size:
        raise HeaderError("ends inside the header")
    (length,) = struct.unpack(_LENGTHS[version], length_bytes)
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
    content = file.read(length)
    if len(content) < length:
        raise HeaderError("ends inside the header")
    return _checked(_parse(content))


def _parse(content: bytes) -> dict[str, Any]:
    try:
        text = content.decode("ascii")
        # Python's own parser: deep nesting is a MemoryError or RecursionError, odd characters a SyntaxError.
        fields = ast.literal_eval(text.strip(" \n"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise HeaderError("a header that is no dictionary of plain values") from None
    if not isinstance(fields, dict) or fields.keys() != _KEYS:
        raise HeaderError(f"a header without exactly the keys {', '.join(sorted(_KEYS))}")
    return fields


def _checked(fields: dict[str, Any]) -> Header:
    descr, shape = fields["descr"], fields["shape"]
    if descr == "|O":
        raise HeaderError("an array of objects, which is refused")
    if not isinstance(descr, str) or descr not in _TYPES:
        raise HeaderError("elements that are no whole numbers of 1 to 8 bytes")
    if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        raise HeaderError("a shape that is none")
    if any(type(size) is not int or not 0 <= size < 2**48 for size in shape):
        raise HeaderError("a shape that is none")
    if not isinstance(fields["fortran_order"], bool) or (fields["fortran_order"] and len(shape) > 1):
        raise HeaderError("the array is not stored row by row")
    return Header(np.dtype(descr), shape)
