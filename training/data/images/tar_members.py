"""Reads known members of a compressed tar archive into memory; nothing is ever extracted to disk.

The headers are read here and not by `tarfile`, which obeys everything that extensions of the format say, among it
what takes seconds, recursion or memory to obey. Of a header this takes the name, the size and the kind. Extended
headers (pax) are passed over, whatever they say; other extensions are refused.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

from training.data.images.image_set import DataError

MAX_MEMBERS = 64
MAX_ARCHIVE_BYTES = 256 * 2**20
MAX_EXTENDED_BYTES = 64 * 2**10
_BLOCK = 512
_CHUNK = 2**16
_FILES, _FOLDERS, _EXTENDED = b"0\x007", b"5", b"xg"


class _Member(NamedTuple):
    """What a header says: name, size in bytes, and one byte for the kind."""

    name: str
    size: int
    kind: bytes


class _Stream:
    """A decompressed stream that ends in an error after so many bytes, whatever a header announces."""

    def __init__(self, path: Path, source: IO[bytes]) -> None:
        self._path, self._source, self._left = path, source, MAX_ARCHIVE_BYTES

    def read(self, size: int) -> bytes:
        """Return at most so many bytes, fewer only at the end."""
        content = self._source.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise DataError(
                f"{self._path}: unpacks to more than {MAX_ARCHIVE_BYTES} bytes, which no known archive does; "
                "fetch it again"
            )
        return content

    def skip(self, size: int) -> None:
        """Pass over so many bytes."""
        while size:
            content = self.read(min(size, _CHUNK))
            if not content:
                raise EOFError("a member is announced larger than the archive")
            size -= len(content)


def read_members(path: Path, limits: Mapping[str, int]) -> dict[str, bytes]:
    """Return the content of the members that are asked for and present.

    Args:
        path: a .tar.gz archive.
        limits: exact member name → largest size in bytes.

    Returns:
        Member name → content; members that are not there are left out.

    Raises:
        DataError: the archive is damaged, holds a link, a device, a name that leaves it or one name twice,
            or is larger than any known one.
    """
    try:
        with gzip.open(path, "rb") as unpacked:
            stream = _Stream(path, cast(IO[bytes], unpacked))
            found: dict[str, bytes] = {}
            for number, member in enumerate(_headers(path, stream)):
                _read_member(path, stream, number, member, limits, found)
            # What follows the last member is padding; reading it lets gzip check the sum at the end.
            while stream.read(_CHUNK):
                pass
            return found
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged or truncated archive ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _headers(path: Path, stream: _Stream) -> Iterator[_Member]:
    """Yield what the headers say; the content is read between them. A block of zeros, or the end, ends them."""
    for number in range(MAX_MEMBERS + 1):
        block = stream.read(_BLOCK)
        if not block.strip(b"\0"):
            return
        if len(block) < _BLOCK:
            raise EOFError("ends inside a header")
        member = _parse_header(block)
        if member is None or number == MAX_MEMBERS:
            why = "a damaged header, an impossible size" if member is None else f"over {MAX_MEMBERS} members"
            raise DataError(f"{path}: member {number}: {why}: refused; fetch the archive again")
        yield member


def _read_member(
    path: Path,
    stream: _Stream,
    number: int,
    member: _Member,
    limits: Mapping[str, int],
    found: dict[str, bytes],
) -> None:
    """Read the content behind a header into ``found``, or pass over it."""
    what = f"{path}: member {number} ({member.name[:80]!r})"
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{what} leaves the archive: refused")
    if member.kind not in _FILES + _FOLDERS + _EXTENDED:
        raise DataError(f"{what} is a link, a device or an extension that is not read: refused")
    if member.kind in _EXTENDED and member.size > MAX_EXTENDED_BYTES:
        raise DataError(f"{what} is an extended header over {MAX_EXTENDED_BYTES} bytes: refused")
    if member.kind in _FOLDERS:
        return  # their size means nothing: no content follows
    padding = -member.size % _BLOCK
    if member.kind in _EXTENDED or member.name not in limits:
        stream.skip(member.size + padding)
        return
    limit = limits[member.name]
    if member.name in found or member.size > limit:
        raise DataError(f"{path}: member {member.name}: twice, or over {limit} bytes; fetch it again")
    found[member.name] = content = stream.read(member.size)
    if len(content) < member.size:
        raise EOFError("a member is announced larger than the archive")
    stream.skip(padding)


def _parse_header(block: bytes) -> _Member | None:
    """Return what a header block says, None if its sum or its size is none; POSIX.1-1988 and GNU have these fields."""
    checksum = _octal(block[148:156])
    if checksum != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
        return None
    size = _octal(block[124:136])
    if size is None:
        return None
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
        name = f"{prefix}/{name}"
    return _Member(name, size, block[156:157])


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "replace")
