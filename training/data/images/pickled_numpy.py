"""What a pickle may say about numpy, as descriptions: nothing is imported, called or made.

An array is pickled as a call that makes an empty one and a state that fills it, or (protocol 5) as one call;
its type likewise. `call` and `set_state` compare these with the forms that numpy 1 and 2 write for numeric
arrays and note type, shape and place. Anything else is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_MAX_DIMENSIONS = 4
_NUMERIC_TYPE = re.compile(r"b1|[iu][1248]|f[248]")
_NAMES = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("numpy.core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy.core.numeric", "_frombuffer"): "frombuffer",
    ("numpy._core.numeric", "_frombuffer"): "frombuffer",
}


class RefusedError(ValueError):
    """A pickle says something that is not data; the message says what."""


@dataclass(frozen=True)
class ByteString:
    """A byte string left in the file: its place, and its text (Latin-1) where it is short, else None."""

    offset: int
    length: int
    text: str | None


@dataclass(eq=False)
class PickledArray:
    """An array left in the file.

    Attributes:
        dtype: a numeric type.
        shape: sizes; the rows are stored one after the other (C order).
        offset: where in the file the numbers begin; -1 until the array is filled.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of one step along the first dimension."""
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    def read(self, file: BinaryIO, start: int, stop: int) -> NDArray[Any]:
        """Return rows ``start`` to ``stop`` - 1 from the file that the array was found in.

        Raises:
            EOFError: the file has become shorter.
        """
        file.seek(self.offset + start * self.row_bytes)
        content = file.read((stop - start) * self.row_bytes)
        if len(content) != (stop - start) * self.row_bytes:
            raise EOFError(f"the file ends inside rows {start}..{stop - 1}")
        return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class NumpyName:
    """One of the few names that a pickle of arrays contains, by the word that it stands for."""

    word: str


@dataclass(eq=False)
class ElementType:
    """A numpy type under construction: first its name, then its byte order."""

    code: str
    byte_order: str | None = None


def as_text(value: Any) -> str | None:
    """Return the text of a string of Python 2 or 3; None for anything else and for long byte strings."""
    return value if isinstance(value, str) else value.text if isinstance(value, ByteString) else None


def known_name(module: Any, name: Any) -> NumpyName:
    """Return the description of module.name.

    Raises:
        RefusedError: not one of the names that a pickle of numeric arrays contains.
    """
    if not isinstance(module, str) or not isinstance(name, str):
        raise RefusedError("a name that is not a text")
    word = _NAMES.get((module, name))
    if word is None:
        raise RefusedError(f"names {module[:40]!r} {name[:40]!r}, which is not an array of numbers")
    return NumpyName(word)


def call(function: Any, arguments: Any) -> PickledArray | ElementType:
    """Return the description of what a call would make.

    Raises:
        RefusedError: not a call that makes a numeric type or an array of one.
    """
    if not isinstance(function, NumpyName) or type(arguments) is not tuple:
        raise RefusedError("calls something that is not known here")
    if function.word == "reconstruct" and arguments[:1] == (NumpyName("ndarray"),):
        return PickledArray(np.dtype(np.uint8), (0,), -1)
    if function.word == "frombuffer" and len(arguments) == 4 and as_text(arguments[3]) == "C":
        data, element, shape, _ = arguments
        return _array(shape, element, data)
    if function.word == "dtype" and arguments:
        code = as_text(arguments[0])
        if code is None or not _NUMERIC_TYPE.fullmatch(code):
            raise RefusedError("an array of objects or of another type that is not numeric")
        return ElementType(code)
    raise RefusedError(f"calls {function.word} in a way that is not known here")


def set_state(target: Any, state: Any) -> None:
    """Complete a numeric type or an array.

    Raises:
        RefusedError: not the state of a numeric type, or of an array stored row by row.
    """
    if isinstance(target, ElementType) and type(state) is tuple and len(state) == 8:
        byte_order = as_text(state[1])
        if state[0] != 3 or byte_order not in ("<", ">", "|") or state[2:5] != (None,) * 3:
            raise RefusedError("an array of records or of another type that is not numeric")
        target.byte_order = byte_order
    elif isinstance(target, PickledArray) and type(state) is tuple and len(state) == 5:
        version, shape, element, is_fortran, data = state
        if version != 1 or is_fortran not in (0, False):
            raise RefusedError("an array that is not stored row by row")
        array = _array(shape, element, data)
        target.dtype, target.shape, target.offset = array.dtype, array.shape, array.offset
    else:
        raise RefusedError("sets the state of something that is not an array")


def _array(shape: Any, element: Any, data: Any) -> PickledArray:
    if not isinstance(element, ElementType) or element.byte_order is None:
        raise RefusedError("an array without a complete type")
    if not isinstance(data, ByteString):
        raise RefusedError("an array whose numbers are not bytes (an array of objects?)")
    if type(shape) is not tuple or not 1 <= len(shape) <= _MAX_DIMENSIONS:
        raise RefusedError(f"an array without a shape of 1..{_MAX_DIMENSIONS} sizes")
    dtype = np.dtype(element.byte_order + element.code)
    num_bytes = dtype.itemsize
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**48:
            raise RefusedError("an array with an impossible shape")
        num_bytes *= size
    if num_bytes != data.length:
        raise RefusedError(f"an array whose shape takes {num_bytes} bytes has {data.length}")
    return PickledArray(dtype, shape, data.offset)
