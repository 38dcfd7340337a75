"""Files that hold the ranks of a byte-level BPE tokenizer: the .tiktoken format and GPT-2's pair of files.

Ranks are kept as a list: `ranks[r]` is the bytes of rank r, which is also the token id.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from prime_core.atomic import atomic_write


class TokenizerError(ValueError):
    """A tokenizer cannot be built; the message names the file and the place."""


def check_ranks(ranks: Sequence[bytes]) -> None:
    """Check that `ranks` can encode every byte string, each in one way.

    Raises:
        TokenizerError: a single byte is missing, or a token is empty or there twice.
    """
    tokens = set(ranks)
    missing = [value for value in range(256) if bytes([value]) not in tokens]
    if missing:
        raise TokenizerError(
            f"{len(missing)} of the 256 single bytes have no rank, the first is {missing[0]:#04x}"
        )
    if len(tokens) != len(ranks) or b"" in tokens:
        raise TokenizerError("a token is empty or has two ranks")


def read_rank_file(path: Path) -> list[bytes]:
    """Read a .tiktoken file: on line r+1 the base64 of a token's bytes, a space, and its rank r.

    Returns:
        The bytes of rank 0, 1, 2, ...

    Raises:
        TokenizerError: bad base64, ranks not 0, 1, 2, ..., a token twice, or a single byte missing.
    """
    ranks: list[bytes] = []
    line_of: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}, line {number}"
        fields = line.split(b" ")
        if len(fields) != 2 or not fields[1].isdigit():
            raise TokenizerError(f"{where}: expected 'base64 rank'; is the file truncated?")
        try:
            token = base64.b64decode(fields[0], validate=True)
        except binascii.Error as error:
            raise TokenizerError(f"{where}: bad base64: {error}") from None
        if not token:
            raise TokenizerError(f"{where}: the token is empty")
        if fields[1] != str(number - 1).encode():
            shown = fields[1][:20].decode()
            raise TokenizerError(
                f"{where}: rank {shown}, expected {number - 1}: ranks must count 0, 1, 2, ..."
            )
        if token in line_of:
            raise TokenizerError(f"{where}: token {token!r} is already on line {line_of[token]}")
        line_of[token] = number
        ranks.append(token)
    try:
        check_ranks(ranks)
    except TokenizerError as error:
        raise TokenizerError(f"{path}, after line {len(ranks)}: {error}; is the file truncated?") from None
    return ranks


def write_rank_file(path: Path, ranks: Sequence[bytes]) -> None:
    """Write `ranks` in the .tiktoken format; the file appears whole or not at all.

    Raises:
        TokenizerError: a single byte is missing or a token is there twice.
        OSError: the file cannot be written.
    """
    check_ranks(ranks)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
    atomic_write(path, b"".join(lines))


def read_gpt2_ranks(vocab_file: Path, encoder_file: Path, sha256: tuple[str, str]) -> list[bytes]:
    """Read GPT-2's two files: the list of merges, and the id of every token as a cross-check.

    Both files write bytes as characters: printable Latin-1 bytes as themselves, the 68 others, in order, as
    U+0100, U+0101, ... Ranks 0..255 are the bytes in this same order, then come the merges.

    Args:
        vocab_file: the merges, `vocab.bpe`.
        encoder_file: the ids, `encoder.json`.
        sha256: what the contents of the two files must hash to (hex). They may come from a cache that
            anybody can write to; the bytes that are hashed are the bytes that are parsed.

    Returns:
        The bytes of rank 0, 1, 2, ...

    Raises:
        TokenizerError: a file has another hash or is not of this format, or the two disagree.
        OSError: a file cannot be read.
    """
    vocab, encoder = _read_text(vocab_file, sha256[0]), _read_text(encoder_file, sha256[1])
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(printable)]
    byte_of = {chr(value): value for value in printable}
    byte_of |= {chr(0x100 + index): value for index, value in enumerate(others)}
    names = list(byte_of)
    for number, line in enumerate(vocab.split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        halves = line.split(" ")
        if len(halves) != 2 or not all(half and all(char in byte_of for char in half) for half in halves):
            raise TokenizerError(
                f"{vocab_file}, line {number}: expected two tokens to merge; is the file truncated?"
            )
        names.append("".join(halves))
    try:
        ids = json.loads(encoder)
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{encoder_file}: not valid JSON ({error}); is the file truncated?") from None
    if not isinstance(ids, dict):
        raise TokenizerError(f"{encoder_file}: expected one JSON object of tokens and ids")
    for rank, name in enumerate(names):
        if ids.get(name) != rank:
            raise TokenizerError(
                f"{encoder_file}: token {name!r} has id {ids.get(name)}, but {vocab_file} gives it rank "
                f"{rank}: the two files do not belong together or one is broken"
            )
    return [bytes(byte_of[char] for char in name) for name in names]


def _read_text(path: Path, sha256: str) -> str:
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise TokenizerError(
            f"{path}: SHA-256 is {found}, expected {sha256}: the file is truncated, changed or of another "
            "tokenizer; replace it by the original"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: invalid UTF-8 at byte offset {error.start}") from None
