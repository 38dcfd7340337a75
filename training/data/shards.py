"""Token shards: a corpus as one long stream of token ids, tokenized once, read through memory maps.

A folder of shards holds `shard-00000.bin`, `shard-00001.bin`, ... (little-endian unsigned integers, no
header) and `manifest.json`. The stream is document, end of text, document, end of text, ...; a block is any
contiguous slice of it, so blocks cross shard files and document ends.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from prime_core.tokenizer import Tokenizer
from training.data.corpus import CorpusError, CorpusOptions, iter_corpus, list_sources
from training.data.dataset import BlockOrder, TokenDataset
from training.data.manifest import MANIFEST_FILE, Manifest, Recipe, ShardError, SourceFile, read_manifest
from training.data.shard_writer import ShardWriter, exclusive_folder, publish, write_manifest
from training.progress import progress_bar

__all__ = ["build_shards", "read_manifest", "Manifest", "TokenDataset", "BlockOrder", "ShardError"]


def build_shards(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    output_dir: Path,
    *,
    shard_tokens: int = 2**24,
    options: CorpusOptions | None = None,
    progress: bool = True,
) -> Manifest:
    """Tokenize a corpus into `output_dir`, or return the manifest that is already there if it still fits.

    The shards are written into a folder beside `output_dir` and renamed at the end, so `output_dir` is
    complete or absent. A lock file beside it makes a second builder wait, then reuse.

    Args:
        paths: corpus files and folders.
        tokenizer: must have an end of text, which is appended to each document.
        output_dir: folder of the shards.
        shard_tokens: tokens per shard file.
        options: how documents are found in the files; None takes the defaults.
        progress: show a progress bar.

    Raises:
        CorpusError: the corpus cannot be read, or changed while it was read.
        ShardError: `output_dir` holds something else, or cannot be written (a full disk, say); then
            whatever was there before is unchanged.
        ValueError: an argument is out of range, or the tokenizer has no end of text.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}: give at least 1")
    if tokenizer.eos_id is None:
        raise ValueError(
            "the tokenizer has no '<|endoftext|>': add it to special_tokens to mark document ends"
        )
    options = CorpusOptions() if options is None else options
    output_dir = output_dir.absolute()
    sources = list_sources(paths)
    recipe = Recipe(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        shard_tokens=shard_tokens,
        document_separator=options.document_separator,
        text_key=options.text_key,
    )
    try:
        with exclusive_folder(output_dir) as partial:
            existing = _reusable(output_dir, recipe, sources)
            if existing is not None:
                return existing
            documents = progress_bar(
                iter_corpus(sources, options), desc="tokenizing", unit=" documents", shown=progress
            )
            manifest = _write(partial, recipe, sources, documents, tokenizer)
            publish(partial, output_dir)
            return manifest
    except OSError as error:
        raise ShardError(
            f"cannot write token shards to {output_dir}: {error.strerror or error}; free space or choose "
            "another folder and run again. Nothing that was there has changed"
        ) from error


def _write(
    folder: Path,
    recipe: Recipe,
    sources: Sequence[Path],
    documents: Iterable[str],
    tokenizer: Tokenizer,
) -> Manifest:
    """Tokenize into an empty folder, manifest last."""
    before = [_describe(path) for path in sources]
    num_bytes = num_documents = 0
    with ShardWriter(folder, recipe.dtype, recipe.shard_tokens) as writer:
        for text in documents:
            writer.write([*tokenizer.encode(text), recipe.eos_id])
            num_bytes += len(text.encode("utf-8"))
            num_documents += 1
    for record, path in zip(before, sources, strict=True):
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != (record.num_bytes, record.mtime_ns):
            raise CorpusError(f"{path}: changed while it was tokenized; run again when it is complete")
    manifest = Manifest(
        **recipe.model_dump(),
        token_dtype=recipe.dtype,
        num_tokens=sum(shard.num_tokens for shard in writer.shards),
        num_bytes=num_bytes,
        num_documents=num_documents,
        shards=writer.shards,
        sources=before,
    )
    write_manifest(folder, manifest)
    return manifest


def _reusable(folder: Path, recipe: Recipe, sources: Sequence[Path]) -> Manifest | None:
    """Return the manifest of `folder` if its shards fit, None if they are to be written."""
    if not folder.exists():
        return None
    if not (folder / MANIFEST_FILE).is_file():
        if folder.is_dir() and not any(folder.iterdir()):
            return None
        raise ShardError(f"{folder} exists and holds no token shards: choose another folder for them")
    manifest = TokenDataset(folder).manifest
    differences = [name for name in Recipe.model_fields if getattr(manifest, name) != getattr(recipe, name)]
    if not _same_sources(manifest.sources, sources):
        differences.append("sources")
    if not differences:
        return manifest
    raise ShardError(
        f"the token shards in {folder} were built with different {', '.join(differences)}: remove the "
        "folder, and they are built again, or choose another one"
    )


def _same_sources(recorded: Sequence[SourceFile], sources: Sequence[Path]) -> bool:
    """Compare contents; a file whose path, size and time are as recorded is not read again."""
    if len(recorded) != len(sources):
        return False
    for record, path in zip(recorded, sources, strict=True):
        status = path.stat()
        if status.st_size != record.num_bytes:
            return False
        untouched = record.path == str(path.resolve()) and record.mtime_ns == status.st_mtime_ns
        if not untouched and _describe(path).sha256 != record.sha256:
            return False
    return True


def _describe(path: Path) -> SourceFile:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise CorpusError(f"{path}: cannot read: {error.strerror or error}") from None
    return SourceFile(
        path=str(path.resolve()),
        num_bytes=status.st_size,
        sha256=digest.hexdigest(),
        mtime_ns=status.st_mtime_ns,
    )
