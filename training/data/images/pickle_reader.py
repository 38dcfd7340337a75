"""Reads a pickled dictionary of numpy arrays without running the pickle.

CIFAR-10 and ImageNet-32 are distributed as pickles, and a pickle is a program. This reader follows the few
instructions that such files consist of and refuses all others. An array comes out as a type, a shape and a
place in the file, so the numbers are read from there on demand and never all at once.

Known are the binary instructions of protocols 2 to 5 that Python 2 and 3 write for dictionaries, lists,
tuples, numbers, strings and numeric arrays. Values are plain containers that are never compared, hashed or
printed as a whole, so a file cannot make them expensive: each instruction costs a bounded amount, or as many
bytes as the file has.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from training.data.images import pickled_numpy
from training.data.images.image_set import DataError
from training.data.images.pickled_numpy import ByteString, PickledArray, RefusedError, as_text

MAX_INSTRUCTIONS = 2_000_000
_MAX_TEXT_BYTES = 4096


def read_pickled_dict(file: BinaryIO, path: Path) -> dict[str, Any]:
    """Read a pickled dictionary with texts as keys.

    Args:
        file: the whole file, open and seekable.
        path: its name for messages.

    Returns:
        The values: None, bool, int, float, str, list, tuple, dict, `ByteString` or `PickledArray`.

    Raises:
        DataError: not such a pickle, truncated, over a limit, or with anything in it that is not data.
    """
    return _Reader(file, path).run()


class _Reader:
    """The stack and the memo of the pickle machine; `_below` keeps the stacks below the open marks."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._size = file.seek(0, os.SEEK_END)
        self._at = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> dict[str, Any]:
        self._file.seek(0)
        for count in range(MAX_INSTRUCTIONS):
            self._at = self._file.tell()
            code = self.read(1)
            if count == 0 and code != b"\x80":
                self._refuse("not a pickle of protocol 2 or later")
            if code == b".":
                return self._result()
            step = _INSTRUCTIONS.get(code)
            if step is None:
                self._refuse(f"instruction {code!r} is not known here, or is not data")
            try:
                step(self)
            except RefusedError as error:
                self._refuse(str(error))
        self._refuse(f"more than {MAX_INSTRUCTIONS} instructions")

    def read(self, length: int) -> bytes:
        content = self._file.read(length)
        if len(content) != length:
            self._refuse(f"truncated: {length} bytes expected, {len(content)} left")
        return content

    def skip(self, length: int) -> None:
        self.read(length)

    def number(self, layout: str) -> Any:
        """Read one number of the given `struct` layout."""
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def text(self, layout: str) -> None:
        length = self.number(layout)
        if length > _MAX_TEXT_BYTES:
            raise RefusedError(f"a text of {length} bytes, at most {_MAX_TEXT_BYTES}")
        self.push(self.read(length).decode("utf-8", "replace"))

    def byte_string(self, layout: str) -> None:
        """Note where a byte string lies and pass over it; only a short one is read."""
        length, offset = self.number(layout), self._file.tell()
        if length < 0 or length > self._size - offset:
            raise RefusedError(f"truncated: {length} bytes announced, {self._size - offset} left")
        text = self.read(length).decode("latin-1") if length <= _MAX_TEXT_BYTES else None
        self._file.seek(offset + length)
        self.push(ByteString(offset, length, text))

    def integer(self) -> None:
        self.push(int.from_bytes(self.read(self.number("<B")), "little", signed=True))

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if not self._stack:
            raise RefusedError("an instruction finds nothing to work on")
        return self._stack.pop()

    def pop_last(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def open_mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def close_mark(self) -> list[Any]:
        if not self._below:
            raise RefusedError("a mark is missing")
        values, self._stack = self._stack, self._below.pop()
        return values

    def remember(self, index: int) -> None:
        if not self._stack:
            raise RefusedError("an instruction finds nothing to work on")
        self._memo[index] = self._stack[-1]

    def remember_next(self) -> None:
        self.remember(len(self._memo))

    def recall(self, index: int) -> None:
        if index not in self._memo:
            raise RefusedError(f"memo {index} is empty")
        self.push(self._memo[index])

    def set_items(self, pairs: list[Any]) -> None:
        target = self._top(dict)
        if len(pairs) % 2:
            raise RefusedError("a key without a value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            name = as_text(key)
            if name is None or name in target:
                raise RefusedError("a dictionary key that is not a text, or that occurs twice")
            target[name] = value

    def extend(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def name_from_lines(self) -> None:
        module, name = (self._file.readline(80).removesuffix(b"\n").decode("latin-1") for _ in range(2))
        self.push(pickled_numpy.known_name(module, name))

    def name_from_stack(self) -> None:
        self.push(pickled_numpy.known_name(*self.pop_last(2)))

    def call(self) -> None:
        self.push(pickled_numpy.call(*self.pop_last(2)))

    def set_state(self) -> None:
        target, state = self.pop_last(2)
        pickled_numpy.set_state(target, state)
        self.push(target)

    def _top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise RefusedError(f"an instruction finds no {kind.__name__} to work on")
        return self._stack[-1]

    def _result(self) -> dict[str, Any]:
        if len(self._stack) != 1 or self._below or type(self._stack[0]) is not dict:
            self._refuse("the end is reached with something other than one dictionary")
        if self._file.tell() != self._size:
            self._at = self._file.tell()
            self._refuse(f"{self._size - self._at} trailing bytes")
        result: dict[str, Any] = self._stack[0]
        if any(isinstance(value, PickledArray) and value.offset < 0 for value in result.values()):
            self._refuse("an array without numbers")
        return result

    def _refuse(self, what: str) -> NoReturn:
        raise DataError(
            f"{self._path}: offset {self._at}: {what}; nothing in the file was run; "
            "fetch the official file again"
        )


_INSTRUCTIONS: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": lambda reader: reader.skip(1),  # PROTO
    b"\x95": lambda reader: reader.skip(8),  # FRAME: its size is a hint
    b"(": _Reader.open_mark,
    b"N": lambda reader: reader.push(None),
    b"\x88": lambda reader: reader.push(True),
    b"\x89": lambda reader: reader.push(False),
    b"K": lambda reader: reader.push(reader.number("<B")),  # BININT1
    b"M": lambda reader: reader.push(reader.number("<H")),  # BININT2
    b"J": lambda reader: reader.push(reader.number("<i")),  # BININT
    b"\x8a": _Reader.integer,  # LONG1
    b"G": lambda reader: reader.push(reader.number(">d")),  # BINFLOAT
    b"U": lambda reader: reader.byte_string("<B"),  # SHORT_BINSTRING
    b"T": lambda reader: reader.byte_string("<i"),  # BINSTRING
    b"C": lambda reader: reader.byte_string("<B"),  # SHORT_BINBYTES
    b"B": lambda reader: reader.byte_string("<I"),  # BINBYTES
    b"\x8e": lambda reader: reader.byte_string("<Q"),  # BINBYTES8
    b"\x96": lambda reader: reader.byte_string("<Q"),  # BYTEARRAY8
    b"\x8c": lambda reader: reader.text("<B"),  # SHORT_BINUNICODE
    b"X": lambda reader: reader.text("<I"),  # BINUNICODE
    b"]": lambda reader: reader.push([]),
    b"}": lambda reader: reader.push({}),
    b")": lambda reader: reader.push(()),
    b"\x85": lambda reader: reader.push(reader.pop_last(1)),
    b"\x86": lambda reader: reader.push(reader.pop_last(2)),
    b"\x87": lambda reader: reader.push(reader.pop_last(3)),
    b"t": lambda reader: reader.push(tuple(reader.close_mark())),
    b"a": lambda reader: reader.extend([reader.pop()]),
    b"e": lambda reader: reader.extend(reader.close_mark()),
    b"s": lambda reader: reader.set_items(list(reader.pop_last(2))),
    b"u": lambda reader: reader.set_items(reader.close_mark()),
    b"q": lambda reader: reader.remember(reader.number("<B")),  # BINPUT
    b"r": lambda reader: reader.remember(reader.number("<I")),  # LONG_BINPUT
    b"\x94": _Reader.remember_next,  # MEMOIZE
    b"h": lambda reader: reader.recall(reader.number("<B")),  # BINGET
    b"j": lambda reader: reader.recall(reader.number("<I")),  # LONG_BINGET
    b"c": _Reader.name_from_lines,  # GLOBAL
    b"\x93": _Reader.name_from_stack,  # STACK_GLOBAL
    b"R": _Reader.call,  # REDUCE
    b"b": _Reader.set_state,  # BUILD
}
