"""Text corpora: the documents of .txt and .jsonl files, plain or compressed with gzip or Zstandard.

Files are read as streams of lines, so memory is bounded by the longest document. Bytes are decoded here,
strictly: a corpus with a broken byte is refused with the place of that byte, never silently repaired.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

import zstandard

DocumentSeparator = Literal["blank_line", "file"]

_COMPRESSIONS = (".gz", ".zst")
_FORMATS = (".txt", ".jsonl")
_BOM = b"\xef\xbb\xbf"
# A Zstandard block of 4 bytes can expand to 128 KiB; small reads keep a hostile file from filling memory.
_ZSTD_READ_BYTES = 2048


class CorpusError(ValueError):
    """A corpus cannot be read; the message names the file and the place."""


@dataclass(frozen=True)
class CorpusOptions:
    """How documents are found in files.

    Attributes:
        document_separator: for .txt files: "blank_line" ends a document at each run of blank lines
            (lines of white space only); "file" makes the whole file one document.
        text_key: for .jsonl files: the key whose value is the document.
        max_document_bytes: longest document accepted, in UTF-8 bytes: the bound on memory.

    Raises:
        ValueError: a field has a value outside its range.
    """

    document_separator: DocumentSeparator = "blank_line"
    text_key: str = "text"
    max_document_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        if self.document_separator not in ("blank_line", "file"):
            raise ValueError(
                f"document_separator is {self.document_separator!r}: give 'blank_line' or 'file'"
            )
        if not self.text_key:
            raise ValueError("text_key is empty: give the JSON key that holds the text, for example 'text'")
        if self.max_document_bytes < 1:
            raise ValueError(f"max_document_bytes is {self.max_document_bytes}: give at least 1")


def list_sources(paths: Sequence[Path]) -> list[Path]:
    """Return the corpus files in `paths`, folders expanded.

    Files keep the order of `paths`; the files of a folder and its subfolders follow in the order of their
    relative names. Files in a folder that are hidden or have other endings are passed over; a file named
    directly must have a known ending.

    Raises:
        CorpusError: nothing to read, a path is missing or of an unknown kind, or a file is listed twice.
    """
    if not paths:
        raise CorpusError("no corpus paths given: name at least one file or folder")
    sources: list[Path] = []
    for path in paths:
        if path.is_dir():
            sources += _files_of_folder(path)
        elif not path.exists():
            raise CorpusError(f"{path}: no such file or folder")
        elif _kind(path) is None:
            raise CorpusError(
                f"{path}: unknown ending; known are .txt and .jsonl, each also with .gz or .zst"
            )
        else:
            sources.append(path)
    seen: set[Path] = set()
    for source in sources:
        resolved = source.resolve()
        if resolved in seen:
            raise CorpusError(f"{source}: listed twice; name each file once")
        seen.add(resolved)
    return sources


def iter_corpus(paths: Sequence[Path], options: CorpusOptions | None = None) -> Iterator[str]:
    """Yield the documents of all files in `paths`, in the order of `list_sources`.

    Raises:
        CorpusError: see `list_sources` and `iter_documents`; also when there is no document at all.
    """
    sources = list_sources(paths)
    num_documents = 0
    for source in sources:
        for document in iter_documents(source, options):
            num_documents += 1
            yield document
    if num_documents == 0:
        raise CorpusError(
            f"no documents in {', '.join(str(source) for source in sources[:5])}: all are empty"
        )


def iter_documents(path: Path, options: CorpusOptions | None = None) -> Iterator[str]:
    """Yield the non-empty documents of one file.

    A byte order mark at the start is dropped. In "blank_line" mode the lines of a document are joined by a
    line feed (whatever ended them in the file) and the last has none; in "file" mode the text is kept as it
    is; a .jsonl document is the string as written. Documents of white space only are passed over.

    Raises:
        CorpusError: bytes that are not UTF-8 (with the offset in the decompressed stream), a bad JSON line
            (with its number), a document over the limit, a damaged archive or an unreadable file.
    """
    options = CorpusOptions() if options is None else options
    kind = _kind(path)
    if kind is None:
        raise CorpusError(f"{path}: unknown ending; known are .txt and .jsonl, each also with .gz or .zst")
    lines = _iter_lines(path, options.max_document_bytes)
    if kind == ".jsonl":
        yield from _json_documents(path, lines, options.text_key)
    else:
        yield from _text_documents(path, lines, options)


def _files_of_folder(folder: Path) -> list[Path]:
    found = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and _kind(path) is not None:
            found.append(path)
    if not found:
        raise CorpusError(f"{folder}: no .txt or .jsonl files (plain, .gz or .zst) in this folder")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _kind(path: Path) -> str | None:
    """Return ".txt" or ".jsonl", looking through a compression ending; None for anything else."""
    name = path.name.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((ending for ending in _FORMATS if name.endswith(ending)), None)


def _text_documents(path: Path, lines: Iterator[tuple[int, str]], options: CorpusOptions) -> Iterator[str]:
    whole_file = options.document_separator == "file"
    parts: list[str] = []
    num_bytes = 0
    for _, line in lines:
        if not whole_file:
            line = line.rstrip("\r\n")
            if not line.strip():
                if parts:
                    yield "\n".join(parts)
                parts, num_bytes = [], 0
                continue
        parts.append(line)
        num_bytes += len(line.encode("utf-8")) + (0 if whole_file else 1)
        if num_bytes > options.max_document_bytes:
            raise CorpusError(
                f"{path}: a document is longer than max_document_bytes = {options.max_document_bytes}; "
                "separate documents by blank lines (document_separator 'blank_line') or raise the limit"
            )
    text = "".join(parts) if whole_file else "\n".join(parts)
    if text.strip():
        yield text


def _json_documents(path: Path, lines: Iterator[tuple[int, str]], text_key: str) -> Iterator[str]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CorpusError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(record, dict) or text_key not in record:
            raise CorpusError(
                f"{path}, line {number}: no key {text_key!r}; set text_key to the key of the text"
            )
        text = record[text_key]
        if not isinstance(text, str):
            raise CorpusError(
                f"{path}, line {number}: the value of {text_key!r} is {type(text).__name__}, not a string"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CorpusError(
                f"{path}, line {number}: the text has half of a surrogate pair at character {error.start}"
            ) from None
        if text.strip():
            yield text


def _iter_lines(path: Path, max_bytes: int) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its ending), decoded strictly from UTF-8."""
    offset = 0
    number = 0
    try:
        with _open(path) as stream:
            while raw := stream.readline(max_bytes + 1):
                number += 1
                if len(raw) > max_bytes:
                    raise CorpusError(
                        f"{path}, line {number}: longer than max_document_bytes = {max_bytes}; "
                        "split it or raise the limit"
                    )
                start = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
                try:
                    line = raw[start:].decode("utf-8")
                except UnicodeDecodeError as error:
                    place = offset + start + error.start
                    raise CorpusError(
                        f"{path}: invalid UTF-8 at byte offset {place} (line {number}): {error.reason}; "
                        "convert the file to UTF-8"
                    ) from None
                offset += len(raw)
                yield number, line
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise CorpusError(f"{path}: damaged or truncated archive (after {offset} bytes): {error}") from None
    except OSError as error:
        raise CorpusError(f"{path}: cannot read: {error.strerror or error}") from None


def _open(path: Path) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path.open("rb")), buffer_size=1 << 17)
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a Zstandard file of one or more frames.

    zstandard's own stream reader ends quietly when a file is cut in the middle of a frame; half a corpus
    would train without a word. This one raises EOFError.
    """

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._frame_has_begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            compressed = self._source.read(_ZSTD_READ_BYTES)
            if not compressed:
                if self._frame_has_begun:
                    raise EOFError("the file ends inside a Zstandard frame")
                return 0
            self._ready = memoryview(b"".join(self._decompress(compressed)))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()

    def _decompress(self, compressed: bytes) -> Iterator[bytes]:
        while compressed:
            self._frame_has_begun = True
            yield self._frame.decompress(compressed)
            if not self._frame.eof:
                return
            compressed = self._frame.unused_data
            self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._frame_has_begun = False
