"""Files that hold the ranks of a byte-level BPE tokenizer: the .tiktoken format and GPT-2's pair of files.

Ranks are kept as a list: `ranks[r]` is the bytes of rank r, which is also the token id.
"""

import base64
import binascii
import json
import os
from collections.abc import Sequence
from pathlib import Path


class TokenizerError(ValueError):
    """A tokenizer cannot be built; the message names the file and the place."""


def check_ranks(ranks: Sequence[bytes]) -> None:
    """Checks that `ranks` can encode every byte string, each in one way.

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
    """Reads a .tiktoken file: on line r+1 the base64 of a token's bytes, a space, and its rank r.

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
    """Writes `ranks` in the .tiktoken format; the file appears whole or not at all.

    Raises:
        TokenizerError: a single byte is missing or a token is there twice.
        OSError: the file cannot be written.
    """
    check_ranks(ranks)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_gpt2_ranks(vocab_file: Path, encoder_file: Path) -> list[bytes]:
    """Reads GPT-2's two files: the list of merges, and the id of every token as a cross-check.

    Both files write bytes as characters: printable Latin-1 bytes as themselves, the 68 others, in order, as
    U+0100, U+0101, ... Ranks 0..255 are the bytes in this same order, then come the merges.

    Returns:
        The bytes of rank 0, 1, 2, ...

    Raises:
        TokenizerError: a file is not of this format, or the two disagree.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in set(printable)]
    byte_of = {chr(value): value for value in printable}
    byte_of |= {chr(0x100 + index): value for index, value in enumerate(others)}
    names = list(byte_of)
    for number, line in enumerate(_read_text(vocab_file).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        halves = line.split(" ")
        if len(halves) != 2 or not all(half and all(char in byte_of for char in half) for half in halves):
            raise TokenizerError(
                f"{vocab_file}, line {number}: expected two tokens to merge; is the file truncated?"
            )
        names.append("".join(halves))
    try:
        ids = json.loads(_read_text(encoder_file))
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


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: invalid UTF-8 at byte offset {error.start}") from None
