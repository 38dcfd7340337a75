"""Text tokenizers from local rank files, driven by tiktoken. Nothing here opens a network connection.

A byte-level BPE tokenizer is three things: a pattern that splits text into pieces, the ranks of the byte
strings that merging builds inside a piece, and special tokens with ids behind the ranks. A checkpoint
carries them as a `TokenizerSpec` and, for "tiktoken_file", a rank file in its folder.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import tiktoken
from pydantic import BaseModel, ConfigDict, Field, model_validator

from prime_core.rank_files import TokenizerError, check_ranks, read_gpt2_ranks, read_rank_file

__all__ = ["TokenizerSpec", "Tokenizer", "TokenizerError", "load_tokenizer", "END_OF_TEXT", "GPT2_PATTERN"]

END_OF_TEXT = "<|endoftext|>"
# Contractions, letters, digits, other marks (each with one leading space), then white space.
GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)  # fmt: skip
GPT2_NUM_RANKS = 50256

_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
# Files and their SHA-256: the cache they may come from is in a folder that anybody can write to.
_GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# A pattern that passes characters over would lose them in encoding; this is tried when one is loaded.
_PROBE = (
    "".join(map(chr, range(0x20, 0x7F)))
    + " a1\n\n  b's\t\r\n\u00e9\u4e2d\u0416\u0661\U0001f600\u200d\x00\u3000"
)


class TokenizerSpec(BaseModel):
    """Which tokenizer belongs to a model.

    Attributes:
        kind: "tiktoken_file": ranks from `file`; "gpt2": the GPT-2 vocabulary (50256 ranks and the end of
            text) from local files, see `load_tokenizer`; "none": the model has no text tokenizer.
        file: name of the rank file relative to the checkpoint folder: a plain file name.
        pattern: regular expression that splits text into pieces; None is the GPT-2 pattern.
        special_tokens: name to id. Ids follow the ranks without a gap. "<|endoftext|>" ends a document.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["tiktoken_file", "gpt2", "none"]
    file: str | None = None
    pattern: str | None = Field(default=None, min_length=1, max_length=4096)
    special_tokens: dict[str, int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "tiktoken_file":
            _check_file_name(self.file)
        elif self.file is not None:
            raise ValueError(
                f"tokenizer.file belongs to kind 'tiktoken_file'; remove it for kind {self.kind!r}"
            )
        elif self.pattern is not None:
            raise ValueError(
                f"tokenizer.pattern belongs to kind 'tiktoken_file'; remove it for kind {self.kind!r}"
            )
        allowed = {END_OF_TEXT: GPT2_NUM_RANKS} if self.kind == "gpt2" else {}
        if self.kind != "tiktoken_file" and self.special_tokens not in ({}, allowed):
            raise ValueError(f"tokenizer.special_tokens of kind {self.kind!r} is {allowed}; leave it out")
        ids = list(self.special_tokens.values())
        if len(set(ids)) != len(ids) or any(index < 256 for index in ids):
            raise ValueError(
                "tokenizer.special_tokens: ids must be distinct and follow the ranks (at least 256)"
            )
        if any(not name for name in self.special_tokens):
            raise ValueError("tokenizer.special_tokens: a name is empty")
        return self


class Tokenizer:
    """Text to token ids and back.

    Special tokens are never read out of text: "<|endoftext|>" in a prompt is thirteen characters like any
    others. They enter a sequence by id only, and stand for no text when decoding.

    Attributes:
        vocab_size: number of ids; every id in 0..vocab_size-1 is a rank or a special token.
        eos_id: id of "<|endoftext|>", None when there is none.
        fingerprint: SHA-256 (hex) over pattern, ranks and special tokens: equal means equal tokenization.
    """

    def __init__(
        self, ranks: Sequence[bytes], special_tokens: Mapping[str, int], pattern: str | None = None
    ) -> None:
        """Build a tokenizer.

        Args:
            ranks: the bytes of each rank, all 256 single bytes among them.
            special_tokens: name to id, following the ranks without a gap.
            pattern: splits text into pieces; None is the GPT-2 pattern.

        Raises:
            TokenizerError: ranks, special tokens or pattern do not make a tokenizer.
        """
        check_ranks(ranks)
        _check_special_ids(special_tokens, len(ranks))
        self._pattern = GPT2_PATTERN if pattern is None else pattern
        self._special_tokens = dict(special_tokens)
        self._bytes_of = [*ranks, *[b""] * len(special_tokens)]
        self.vocab_size: int = len(self._bytes_of)
        self.eos_id: int | None = special_tokens.get(END_OF_TEXT)
        try:
            self._encoding = tiktoken.Encoding(
                "prime",
                pat_str=self._pattern,
                mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
                special_tokens=self._special_tokens,
            )
            probe = self.decode_bytes(self.encode(_PROBE))
        except ValueError as error:
            raise TokenizerError(f"tokenizer.pattern does not work: {error}") from None
        if probe != _PROBE.encode():
            raise TokenizerError(
                "tokenizer.pattern passes some characters over; it must match every character"
            )
        self.fingerprint: str = self._make_fingerprint(ranks)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`; nothing in it is read as a special token.

        Raises:
            ValueError: `text` has half of a surrogate pair, which no UTF-8 can hold.
        """
        _check_encodable(text)
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`; special tokens give none. A single id may be part of a character.

        Raises:
            ValueError: an id is outside 0..vocab_size-1.
        """
        parts = []
        for item in ids:
            index = int(item)
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token id {index} is outside 0..{self.vocab_size - 1}")
            parts.append(self._bytes_of[index])
        return b"".join(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside 0..vocab_size-1.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each of `ids`; joined they are what `decode` gives.

        Where a character is spread over several ids, the one that completes it has it, and those before have less.

        Raises:
            ValueError: an id is outside 0..vocab_size-1.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        last = len(ids) - 1
        return [decoder.decode(self.decode_bytes([item]), index == last) for index, item in enumerate(ids)]

    def _make_fingerprint(self, ranks: Sequence[bytes]) -> str:
        digest = hashlib.sha256(json.dumps([self._pattern, sorted(self._special_tokens.items())]).encode())
        for token in ranks:
            digest.update(base64.b64encode(token) + b"\n")
        return digest.hexdigest()


def load_tokenizer(spec: TokenizerSpec, folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint; None for kind "none".

    GPT-2 files are looked for as `vocab.bpe` and `encoder.json` in `folder`, then in tiktoken's cache:
    the folder in the environment variable TIKTOKEN_CACHE_DIR (else DATA_GYM_CACHE_DIR, else
    `data-gym-cache` in the temporary folder), where a file is named by the SHA-1 of its address.
    Wherever they lie, their SHA-256 must be the published ones.

    Args:
        spec: which tokenizer.
        folder: the checkpoint folder.

    Raises:
        FileNotFoundError: a file is missing; the message says what to put where.
        TokenizerError: a file is broken or, for GPT-2, not the published one; the message names the file.
    """
    if spec.kind == "none":
        return None
    if spec.kind == "gpt2":
        return _load_gpt2(folder)
    assert spec.file is not None, "checked by TokenizerSpec"
    path = folder / spec.file
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer file {path} is missing: put the rank file of this model there")
    try:
        return Tokenizer(read_rank_file(path), spec.special_tokens, spec.pattern)
    except TokenizerError as error:
        if str(path) in str(error):
            raise
        raise TokenizerError(f"{path}: {error}") from None


def _load_gpt2(folder: Path) -> Tokenizer:
    vocab, encoder = (_find_gpt2_file(name, folder) for name in _GPT2_FILES)
    ranks = read_gpt2_ranks(vocab, encoder, (_GPT2_FILES["vocab.bpe"], _GPT2_FILES["encoder.json"]))
    return Tokenizer(ranks, {END_OF_TEXT: GPT2_NUM_RANKS})


def _find_gpt2_file(name: str, folder: Path) -> Path:
    default_cache = Path(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", str(default_cache)))
    cached_name = hashlib.sha1((_GPT2_URL + name).encode(), usedforsecurity=False).hexdigest()
    candidates = [folder / name]
    if cache:  # tiktoken reads an empty value as "no cache"
        candidates.append(Path(cache, cached_name))
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"GPT-2 tokenizer file {name} not found, and it is never downloaded: put {_GPT2_URL}{name} at "
        f"{candidates[0]}, or at {cached_name} in the folder that TIKTOKEN_CACHE_DIR names "
        f"(now {cache or 'empty'})"
    )


def _check_file_name(file: str | None) -> None:
    if file is None:
        raise ValueError("tokenizer.file is missing: name the rank file in the checkpoint folder")
    if not file.strip() or file in (".", "..") or any(char in file for char in "/\\:\0"):
        raise ValueError("tokenizer.file must be a plain file name in the checkpoint folder, without a path")


def _check_special_ids(special_tokens: Mapping[str, int], num_ranks: int) -> None:
    expected = list(range(num_ranks, num_ranks + len(special_tokens)))
    ids = sorted(special_tokens.values())
    if ids != expected:
        raise TokenizerError(
            f"{num_ranks} ranks, so the special tokens must have the ids from {num_ranks} on, not "
            f"{ids[:5]}: the ranks are truncated or belong to another tokenizer (give an unused id a name)"
        )


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has half of a surrogate pair at character {error.start}; it must be valid Unicode"
        ) from None
