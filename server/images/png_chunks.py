"""What of a PNG file from outside may reach the library that decodes it: its head and its pixels, nothing else.

A PNG file is a chain of chunks: length, kind, content, checksum. Most kinds are of no use here, and costly: texts and
colour profiles unpack to a thousand times their size, and a second head changes the size of the picture after the first
was checked. So the chain is walked here, where nothing is unpacked, and built anew from what is needed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEAD = struct.Struct(">IIBBBBB")  # width, height, bits, colour type, compression, filter, interlace
_ANCILLARY = 0x20  # set in the first letter of a kind that a reader may skip: it is a small one
_UNUSED = frozenset({b"IEND", b"PLTE"})  # a palette is no more than a hint, but where the head asks for it
_NOT_ONE_PLAIN_PICTURE = frozenset({b"tRNS", b"acTL"})  # transparency, animation


class NotPngError(ValueError):
    """A file is no whole PNG file."""


class NotPlainError(ValueError):
    """A PNG file holds transparency, or more than one picture."""


class PngHead(NamedTuple):
    """What the head says.

    Attributes:
        width: pixels in a row.
        height: rows.
        bits: of a channel.
        colour_type: 0 for grey, 2 for RGB.
    """

    width: int
    height: int
    bits: int
    colour_type: int


class PlainPng(NamedTuple):
    """A PNG file of one head, one run of packed pixels and the end mark.

    Attributes:
        head: what it says of itself.
        file: its bytes.
    """

    head: PngHead
    file: bytes


def plain_png(file: bytes) -> PlainPng:
    """Return a PNG file without all that its pixels do not need; nothing is unpacked.

    Raises:
        NotPngError: if its chain of chunks is broken, or has other critical chunks than one head, a palette, one run
            of pixels and the end.
        NotPlainError: if it holds transparency, or more than one picture.
    """
    head: bytes | None = None
    pixels: list[bytes] = []
    before = b""
    for kind, content in _chunks(file):
        if (head is None) != (kind == b"IHDR") or (kind == b"IDAT" and pixels and before != b"IDAT"):
            raise NotPngError
        if kind == b"IHDR":
            head = content
        elif kind == b"IDAT":
            pixels.append(content)
        elif kind in _NOT_ONE_PLAIN_PICTURE:
            raise NotPlainError
        elif kind not in _UNUSED and not kind[0] & _ANCILLARY:
            raise NotPngError
        before = kind
    if head is None or len(head) != _HEAD.size or not pixels:
        raise NotPngError
    built = SIGNATURE + _chunk(b"IHDR", head) + _chunk(b"IDAT", b"".join(pixels)) + _chunk(b"IEND", b"")
    return PlainPng(PngHead(*_HEAD.unpack(head)[:4]), built)


def _chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and content of each chunk up to the end mark; what comes behind it is not looked at."""
    if not file.startswith(SIGNATURE):
        raise NotPngError
    start, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        length, kind = struct.unpack(">I4s", _part(file, start, 8))
        content = _part(file, start + 8, length)
        (checksum,) = struct.unpack(">I", _part(file, start + 8 + length, 4))
        if checksum != zlib.crc32(content, zlib.crc32(kind)):
            raise NotPngError
        yield kind, content
        start += 12 + length


def _part(file: bytes, start: int, length: int) -> bytes:
    if start + length > len(file):
        raise NotPngError
    return file[start : start + length]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
