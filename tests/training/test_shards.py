"""Token shards: the stream and its counts, reuse and refusal, atomicity, and the order of blocks."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prime_core.tokenizer import END_OF_TEXT, Tokenizer
from training.data import shard_writer
from training.data.corpus import CorpusError, CorpusOptions
from training.data.shard_writer import ShardWriter
from training.data.shards import ShardError, TokenDataset, build_shards

BYTES = [bytes([value]) for value in range(256)]
TOKENIZER = Tokenizer(BYTES, {END_OF_TEXT: 256})
STREAM = [*b"hello\nyou", 256, *"thrée".encode(), 256, *b"x", 256]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("hello\nyou\n\nthrée\n", encoding="utf-8")
    (folder / "b.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    return folder


def _build(corpus: Path, output: Path, **arguments: Any) -> TokenDataset:
    arguments = {"progress": False, "shard_tokens": 7} | arguments
    manifest = build_shards([corpus], arguments.pop("tokenizer", TOKENIZER), output, **arguments)
    dataset = TokenDataset(output)
    assert dataset.manifest == manifest
    return dataset


def _entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"corpus", ".shards.lock"}


def test_stream_and_counts(tmp_path: Path, corpus: Path) -> None:
    dataset = _build(corpus, tmp_path / "shards")
    manifest = dataset.manifest
    assert dataset.block(0, 19).tolist() == STREAM
    assert dataset.num_tokens == len(dataset) == manifest.num_tokens == len(STREAM) == 19
    assert manifest.num_bytes == len("hello\nyouthréex".encode()) == 16
    assert (manifest.num_documents, manifest.eos_id, manifest.token_dtype) == (3, 256, "uint16")
    assert [shard.num_tokens for shard in manifest.shards] == [7, 7, 5]
    assert [Path(source.path).name for source in manifest.sources] == ["a.txt", "b.jsonl"]
    assert manifest.tokenizer_fingerprint == TOKENIZER.fingerprint
    assert _entries(tmp_path) == {"shards"}


def test_blocks_cross_shards(tmp_path: Path, corpus: Path) -> None:
    dataset = _build(corpus, tmp_path / "shards")
    for length in (1, 3, 7, 8, 19):
        assert dataset.num_blocks(length) == 19 // length
        for index in range(dataset.num_blocks(length)):
            block = dataset.block(index, length)
            assert block.dtype == np.int64
            assert block.tolist() == STREAM[index * length : (index + 1) * length]
    assert dataset.num_blocks(20) == 0
    for index in (-1, 2):
        with pytest.raises(ValueError, match=rf"block {index} is outside 0\.\.1"):
            dataset.block(index, 8)
    with pytest.raises(ValueError, match="length is 0"):
        dataset.num_blocks(0)


def test_large_vocabulary_takes_four_bytes(tmp_path: Path, corpus: Path) -> None:
    pairs = [bytes([first, second]) for first in range(256) for second in range(256)]
    largest = Tokenizer((BYTES + pairs)[: 2**16 - 1], {END_OF_TEXT: 2**16 - 1})
    larger = Tokenizer((BYTES + pairs)[: 2**16], {END_OF_TEXT: 2**16})
    for tokenizer, dtype, size in ((largest, "uint16", 2), (larger, "uint32", 4)):
        dataset = _build(corpus, tmp_path / dtype, tokenizer=tokenizer, shard_tokens=2**24)
        assert dataset.manifest.token_dtype == dtype
        assert (tmp_path / dtype / "shard-00000.bin").stat().st_size == size * dataset.num_tokens
        assert dataset.block(0, dataset.num_tokens)[-1] == tokenizer.eos_id
        assert tokenizer.decode(dataset.block(0, dataset.num_tokens).tolist()) == "hello\nyouthréex"


def test_fitting_shards_are_reused(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _build(corpus, tmp_path / "shards")
    monkeypatch.setattr(ShardWriter, "write", lambda *_: pytest.fail("tokenized again"))
    _build(corpus, tmp_path / "shards")
    # A copy of the corpus elsewhere, with other times, has the same contents.
    moved = corpus.rename(tmp_path / "moved")
    os.utime(moved / "a.txt", (1, 1))
    assert _build(moved, tmp_path / "shards").manifest == first.manifest


@pytest.mark.parametrize("text", ["hello\nyou\n\nthrée\nmore", "hullo\nyou\n\nthrée\n"])
def test_an_old_time_of_change_does_not_hide_other_contents(text: str, tmp_path: Path, corpus: Path) -> None:
    """As a copy that keeps times has: of another length in its place, or of the same one elsewhere."""
    _build(corpus, tmp_path / "shards")
    status = (corpus / "a.txt").stat()
    moved = corpus.rename(tmp_path / "moved") if text.startswith("hu") else corpus
    (moved / "a.txt").write_text(text, encoding="utf-8")
    os.utime(moved / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ShardError, match="different sources"):
        _build(moved, tmp_path / "shards")


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"tokenizer": Tokenizer(BYTES, {END_OF_TEXT: 256}, r"\s|\S+")}, "tokenizer_fingerprint"),
        ({"shard_tokens": 8}, "shard_tokens"),
        ({"options": CorpusOptions("file")}, "document_separator"),
        ({"options": CorpusOptions(text_key="body")}, "text_key"),
    ],
)
def test_other_shards_are_refused_and_kept(
    tmp_path: Path, corpus: Path, arguments: dict[str, Any], difference: str
) -> None:
    before = _build(corpus, tmp_path / "shards").manifest
    with pytest.raises(ShardError, match=f"built with different {difference}: remove the folder"):
        _build(corpus, tmp_path / "shards", **arguments)
    assert TokenDataset(tmp_path / "shards").manifest == before


def test_changed_sources_are_refused_until_the_folder_is_removed(tmp_path: Path, corpus: Path) -> None:
    _build(corpus, tmp_path / "shards")
    status = (corpus / "a.txt").stat()
    (corpus / "a.txt").write_text("hullo\nyou\n\nthrée\n", encoding="utf-8")
    os.utime(corpus / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ShardError, match="different sources"):
        _build(corpus, tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards")
    dataset = _build(corpus, tmp_path / "shards")
    assert dataset.block(0, 5).tobytes() == np.array(list(b"hullo")).tobytes()
    (corpus / "c.txt").write_text("more", encoding="utf-8")
    with pytest.raises(ShardError, match="different sources"):
        _build(corpus, tmp_path / "shards")
    assert _entries(tmp_path) == {"shards"}


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "shards").mkdir()
    _build(corpus, tmp_path / "shards")  # an empty folder may be taken
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ShardError, match="holds no token shards"):
        _build(corpus, other)
    assert (other / "thesis.tex").read_text(encoding="utf-8") == "years of work"


def test_damaged_shards_are_noticed(tmp_path: Path, corpus: Path) -> None:
    _build(corpus, tmp_path / "shards")
    shard = tmp_path / "shards" / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"shard-00001\.bin has 13 bytes, the manifest says 14"):
        TokenDataset(tmp_path / "shards")
    with pytest.raises(ShardError, match=r"remove .*shards and build the shards again$"):
        _build(corpus, tmp_path / "shards")
    shard.unlink()
    with pytest.raises(ShardError, match=r"shard-00001\.bin is missing"):
        TokenDataset(tmp_path / "shards")
    shard.write_bytes(b"\xff" * 14)
    with pytest.raises(ShardError, match="hold id 65535, the vocabulary ends at 256"):
        TokenDataset(tmp_path / "shards").block(1, 7)
    shard.write_bytes(b"\x00\x01" * 6 + b"\x01\x01")
    assert TokenDataset(tmp_path / "shards").block(7, 1).tolist() == [256]
    with pytest.raises(ShardError, match="hold id 257, the vocabulary ends at 256"):
        TokenDataset(tmp_path / "shards").block(13, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version"),
        ({"surprise": 1}, "surprise"),
        ({"num_tokens": 18}, "contradicts"),
        ({"token_dtype": "uint32"}, "contradicts"),
        ({"shards": [{"file": "../x.bin", "num_tokens": 18}]}, r"shards\.0\.file"),
    ],
)
def test_bad_manifest_is_refused(
    tmp_path: Path, corpus: Path, change: dict[str, object], message: str
) -> None:
    _build(corpus, tmp_path / "shards")
    path = tmp_path / "shards" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ShardError, match=message):
        TokenDataset(tmp_path / "shards")


def test_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no token shards"):
        TokenDataset(tmp_path / "no")
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(ShardError, match=r"manifest\.json: the file: Invalid JSON"):
        TokenDataset(tmp_path)


class _FullDisk:
    """A file that holds ten bytes."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_full_disk_leaves_nothing_behind(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", **rest: (
            _FullDisk(original(path, mode, **rest)) if mode == "xb" else original(path, mode, **rest)
        ),
    )
    with pytest.raises(ShardError, match=r"No space left on device; free space .* Nothing that was there"):
        _build(corpus, tmp_path / "shards")
    assert _entries(tmp_path) == set()
    monkeypatch.undo()
    _build(corpus, tmp_path / "shards")


def test_failed_rename_leaves_nothing_behind(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ShardError, match="Input/output error"):
        _build(corpus, tmp_path / "shards")
    assert _entries(tmp_path) == set()


def test_shards_are_on_disk_before_the_folder_gets_its_name(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[object] = []
    rename = Path.rename

    def synced(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        happened.append((path.name, path.stat().st_size if path.is_file() else "folder"))

    def renamed(path: Path, target: Path) -> Path:
        happened.append((path.name, target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    _build(corpus, tmp_path / "shards")
    move = (".shards.partial", "shards")
    assert happened[:3] == [("shard-00000.bin", 14), ("shard-00001.bin", 14), ("shard-00002.bin", 10)]
    assert happened[-3:] == [(".shards.partial", "folder"), move, (tmp_path.name, "folder")]
    assert ".manifest.json.partial" in {name for name, _ in happened[3:-3]}  # type: ignore[misc]


def test_leftovers_of_a_killed_builder_are_cleared(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / ".shards.partial").mkdir()
    (tmp_path / ".shards.partial" / "shard-00000.bin").write_bytes(b"half")
    assert _build(corpus, tmp_path / "shards").block(0, 19).tolist() == STREAM
    assert _entries(tmp_path) == {"shards"}


def test_two_builders_make_one(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[Path] = []
    original = shard_writer.publish

    def publish(partial: Path, target: Path) -> None:
        published.append(target)
        original(partial, target)

    monkeypatch.setattr("training.data.shards.publish", publish)
    threads = [threading.Thread(target=_build, args=(corpus, tmp_path / "shards")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(published) == 1
    assert TokenDataset(tmp_path / "shards").num_tokens == 19


def test_source_that_changes_meanwhile_is_refused(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ShardWriter.write

    def write(writer: ShardWriter, ids: list[int]) -> None:
        with (corpus / "b.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n")
        original(writer, ids)

    monkeypatch.setattr(ShardWriter, "write", write)
    with pytest.raises(CorpusError, match=r"b\.jsonl: changed while"):
        _build(corpus, tmp_path / "shards")
    assert _entries(tmp_path) == set()


def test_bad_corpus_leaves_nothing_behind(tmp_path: Path, corpus: Path) -> None:
    (corpus / "c.txt").write_bytes(b"ok\n\nab\xff")
    with pytest.raises(CorpusError, match=r"c\.txt: invalid UTF-8 at byte offset 6"):
        _build(corpus, tmp_path / "shards")
    assert _entries(tmp_path) == set()


def test_arguments_are_checked(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"has no '<\|endoftext\|>'"):
        _build(corpus, tmp_path / "shards", tokenizer=Tokenizer(BYTES, {}))
    with pytest.raises(ValueError, match="shard_tokens is 0: give at least 1"):
        _build(corpus, tmp_path / "shards", shard_tokens=0)
