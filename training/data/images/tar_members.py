"""Reads known members of a compressed tar archive into memory; nothing is ever extracted to disk."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, cast

from training.data.images.image_set import DataError

MAX_MEMBERS = 64
MAX_ARCHIVE_BYTES = 256 * 2**20
_MAX_READS_AT_END = 16


class _BoundedStream:
    """A decompressed stream that ends in an error after so many bytes, whatever a tar header announces.

    To pass over a member tarfile reads until it has seen the announced size, also when nothing is left, which
    for a size of 2**90 takes for ever. So reading on and on at the end is an error as well.
    """

    def __init__(self, path: Path, source: IO[bytes]) -> None:
        self._path, self._source, self._left = path, source, MAX_ARCHIVE_BYTES
        self._reads_at_end = 0

    def read(self, size: int) -> bytes:
        content = self._source.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise DataError(
                f"{self._path}: unpacks to more than {MAX_ARCHIVE_BYTES} bytes, which no known archive does; "
                "fetch it again"
            )
        if not content:
            self._reads_at_end += 1
            if self._reads_at_end > _MAX_READS_AT_END:
                raise EOFError("a member is announced larger than the archive")
        return content


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
            stream = cast(IO[bytes], _BoundedStream(path, cast(IO[bytes], unpacked)))
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                found = _read_members(path, archive, limits)
            # What follows the last member is padding; reading it lets gzip check the sum at the end.
            while stream.read(2**16):
                pass
            return found
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged or truncated archive ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_members(path: Path, archive: tarfile.TarFile, limits: Mapping[str, int]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for number, member in enumerate(archive):
        _check_member(path, number, member)
        if member.name not in limits:
            continue
        limit = limits[member.name]
        if member.name in found or not member.isreg() or member.size > limit:
            raise DataError(
                f"{path}: member {member.name}: twice, not a file, or over {limit} bytes; fetch it again"
            )
        content = archive.extractfile(member)
        assert content is not None
        found[member.name] = content.read()
    return found


def _check_member(path: Path, number: int, member: tarfile.TarInfo) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{path}: member {number} ({member.name[:80]!r}) leaves the archive: refused")
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise DataError(f"{path}: member {number} ({member.name[:80]!r}) is a link or a device: refused")
    if number >= MAX_MEMBERS or member.size < 0:
        raise DataError(
            f"{path}: member {number}: an impossible size, or over {MAX_MEMBERS} members: refused"
        )
