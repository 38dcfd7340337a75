"""API keys: who may send requests. Only digests of the keys stay in memory, and no message holds a key.

A file holds one key a line, or ``name:key``; blank lines and lines that begin with ``#`` are skipped. The name is for
the log. Keys may also come in the environment, PRIME_API_KEY (one) and PRIME_API_KEYS (between commas); they are
taken out of it, so that no child process inherits them.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger("prime.server")

KEY_VARIABLES = ("PRIME_API_KEY", "PRIME_API_KEYS")
MAX_KEY_CHARS = 1024
SHORT_KEY_CHARS = 16  # shorter keys can be guessed; they work, with a warning
MAX_FILE_BYTES = 2**20
_KEY = re.compile(rb"[\x21-\x7e]{1,%d}" % MAX_KEY_CHARS)
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class KeysError(ValueError):
    """The keys cannot be used; the message names the place and never holds a key."""


class Key(NamedTuple):
    """One key: its name for the log, and the SHA-256 digest of its bytes."""

    name: str
    digest: bytes


class KeyRing:
    """The keys that are accepted. Any thread may ask; `refresh` is for one thread at a time.

    Attributes:
        file: the file of keys, or None.
    """

    def __init__(self, file: Path | None = None, fixed: Iterable[Key] = ()) -> None:
        """Read the keys.

        Args:
            file: with one key a line, read again by `refresh`; None without one.
            fixed: keys that do not change.

        Raises:
            KeysError: if the file cannot be read or holds no key.
        """
        self.file = file
        self._fixed = tuple(fixed)
        self._mark = None if file is None else _mark_of(file)
        self._keys = self._fixed if file is None else self._fixed + read_keys(file)

    def __bool__(self) -> bool:
        """Whether any key is asked for at all."""
        return bool(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def name_of(self, key: bytes) -> str | None:
        """Return the name of a key that is accepted, else None.

        The time it takes tells nothing: all digests are compared, each in constant time.

        Args:
            key: as it was sent; what no key can be is not accepted.
        """
        if not _KEY.fullmatch(key):
            return None
        digest = hashlib.sha256(key).digest()
        found = None
        for known in self._keys:
            if hmac.compare_digest(known.digest, digest):
                found = known.name
        return found

    def refresh(self, *, force: bool = False) -> None:
        """Read the file again if it has changed; one that is damaged leaves the keys as they are.

        Args:
            force: read it even if it looks the same.
        """
        if self.file is None:
            return
        mark = _mark_of(self.file)
        if mark == self._mark and not force:
            return
        self._mark = mark  # also of a damaged file: it is told of once
        try:
            self._keys = self._fixed + read_keys(self.file)
        except KeysError as error:
            logger.error("the API keys stay as they are: %s", error)
        else:
            logger.info("API keys read again: %d are accepted", len(self._keys))


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys of a file.

    Raises:
        KeysError: if it cannot be read, is over 1 MB, holds no key, or one that a header cannot carry.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeysError(f"cannot read {path}: {error.strerror}") from None
    if len(text) > MAX_FILE_BYTES:
        raise KeysError(f"{path} is over {MAX_FILE_BYTES} bytes")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    keys = [
        _parse(line, f"line-{number}", f"{path}, line {number}")
        for number, line in lines
        if line and not line.startswith(b"#")
    ]
    if not keys:
        raise KeysError(f"{path} holds no key; write one a line, or do without the file")
    return tuple(keys)


def take_environment_keys(environment: MutableMapping[str, str] | None = None) -> tuple[Key, ...]:
    """Return the keys of the environment, and remove them from it.

    Args:
        environment: None for that of the process.

    Raises:
        KeysError: if a variable is there but empty (an open server is never an accident), or no key.
    """
    environment = os.environ if environment is None else environment
    keys: list[Key] = []
    for written_as in [name for name in environment if name.upper() in KEY_VARIABLES]:
        variable, value = written_as.upper(), environment.pop(written_as)
        parts = [value] if variable == "PRIME_API_KEY" else value.split(",")
        for number, part in enumerate(parts, 1):
            written = part.strip().encode("utf-8", "surrogateescape")
            if not written:
                raise KeysError(f"{variable} holds an empty key; give it a key, or unset it")
            keys.append(_parse(written, f"environment-{number}", variable))
    return tuple(keys)


def _parse(line: bytes, default_name: str, place: str) -> Key:
    """Return the key of ``key`` or ``name:key``; the default name numbers the line."""
    name, colon, key = line.partition(b":")
    if not colon:
        name, key = default_name.encode(), line
    shown = name.decode("ascii", "replace")
    if not _NAME.fullmatch(shown):
        raise KeysError(
            f"{place}: in name:key the name must be 1 to 64 letters, digits, '_', '.' or '-'; "
            "a key that holds a colon needs a name"
        )
    if not _KEY.fullmatch(key):
        raise KeysError(f"{place}: a key must be 1 to {MAX_KEY_CHARS} printable ASCII characters, no spaces")
    if len(key) < SHORT_KEY_CHARS:
        logger.warning("%s: a key of under %d characters can be guessed", place, SHORT_KEY_CHARS)
    return Key(shown, hashlib.sha256(key).digest())


def _mark_of(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file does; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
