"""The manifest of a folder of token shards: what is in it, and what it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training.data.corpus import DocumentSeparator

MANIFEST_FILE = "manifest.json"


class ShardError(ValueError):
    """Token shards cannot be written or read; the message names the folder or file and the remedy."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SourceFile(_Record):
    """One corpus file as it was when the shards were built: absolute path, size, SHA-256, time of change."""

    path: str
    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    mtime_ns: int


class ShardFile(_Record):
    """One shard file of the folder."""

    file: str = Field(pattern=r"^shard-\d{5,}\.bin$")
    num_tokens: int = Field(ge=1)


class Recipe(_Record):
    """What, besides the corpus, decides the contents of the shards.

    Attributes:
        tokenizer_fingerprint: identifies the tokenizer.
        vocab_size: number of token ids.
        eos_id: id that ends each document.
        shard_tokens: tokens per shard file.
        document_separator: see `CorpusOptions`.
        text_key: see `CorpusOptions`.
    """

    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=1, le=2**32)
    eos_id: int = Field(ge=0)
    shard_tokens: int = Field(ge=1)
    document_separator: DocumentSeparator
    text_key: str

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """The smallest type of the two that holds every id; little-endian in the files."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"


class Manifest(Recipe):
    """What a folder of shards holds.

    Attributes:
        token_dtype: type of an id in the files, equal to `dtype`.
        num_tokens: length of the stream, one end of text per document included.
        num_bytes: UTF-8 bytes of the document texts alone. Neither the end of text nor the separators of
            the source files count: bits per byte = nats of the stream / (ln 2 · num_bytes) then charges
            for every end of text and credits no byte for it, so the figure is never flattered.
        num_documents: number of documents, and of ends of text.
        shards: the files in stream order.
        sources: the corpus files in order.
    """

    format_version: Literal[1] = 1
    token_dtype: Literal["uint16", "uint32"]
    num_tokens: int = Field(ge=1)
    num_bytes: int = Field(ge=1)
    num_documents: int = Field(ge=1)
    shards: list[ShardFile] = Field(min_length=1)
    sources: list[SourceFile] = Field(min_length=1)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder of shards.

    Raises:
        ShardError: the folder has none, or one that this version cannot read.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"{folder} holds no token shards ({MANIFEST_FILE} is missing): build them") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ShardError(f"{path}: {place}: {first['msg']}; remove the folder and build it again") from None
    total = sum(shard.num_tokens for shard in manifest.shards)
    if total != manifest.num_tokens or manifest.token_dtype != manifest.dtype:
        raise ShardError(
            f"{path}: num_tokens or token_dtype contradicts the rest; remove the folder and build it again"
        )
    return manifest
