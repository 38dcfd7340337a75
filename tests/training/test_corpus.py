"""Corpus reading: documents of every kind of file, and the place of every defect."""

import errno
import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from training.data.corpus import CorpusError, CorpusOptions, iter_corpus, iter_documents, list_sources
from training.data.demo_corpus import chapters, main, read_bible, split, write_demo_corpus

TEXT = "one\ntwo\n\n \nthrée\n\n\n"
PACKERS = {"": lambda raw: raw, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


def _write(folder: Path, name: str, raw: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACKERS[path.suffix if path.suffix in PACKERS else ""](raw))
    return path


@pytest.mark.parametrize("ending", list(PACKERS))
def test_text_documents(tmp_path: Path, ending: str) -> None:
    path = _write(tmp_path, "a.txt" + ending, TEXT.encode())
    assert list(iter_documents(path)) == ["one\ntwo", "thrée"]
    assert list(iter_documents(path, CorpusOptions("file"))) == [TEXT]


@pytest.mark.parametrize("ending", list(PACKERS))
def test_json_documents(tmp_path: Path, ending: str) -> None:
    lines = [json.dumps({"text": "one\n\ntwo"}), "", json.dumps({"id": 1, "text": "three"}), '{"text": " "}']
    path = _write(tmp_path, "a.jsonl" + ending, "\n".join(lines).encode())
    assert list(iter_documents(path)) == ["one\n\ntwo", "three"]
    other = _write(tmp_path, "b.jsonl", b'{"body": "x"}')
    assert list(iter_documents(other, CorpusOptions(text_key="body"))) == ["x"]


def test_line_endings_and_byte_order_mark(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree")
    assert list(iter_documents(path)) == ["one\ntwo", "three"]
    assert list(iter_documents(path, CorpusOptions("file"))) == ["one\r\ntwo\r\n\r\nthree"]


def test_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    _write(tmp_path, "b.txt", b"2")
    _write(tmp_path, "a/z.txt.gz", b"1")
    _write(tmp_path, "c.JSONL", b'{"text": "3"}')
    _write(tmp_path, ".hidden/x.txt", b"no")
    _write(tmp_path, ".x.txt", b"no")
    _write(tmp_path, "notes.md", b"no")
    extra = _write(tmp_path.parent, f"{tmp_path.name}-extra.txt", b"0")
    assert list(iter_corpus([extra, tmp_path])) == ["0", "1", "2", "3"]


def test_paths_that_give_nothing(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no corpus paths"):
        list_sources([])
    with pytest.raises(CorpusError, match="no such file"):
        list_sources([tmp_path / "no.txt"])
    with pytest.raises(CorpusError, match=r"no \.txt or \.jsonl files"):
        list_sources([tmp_path])
    blank = _write(tmp_path, "blank.txt", b"\n \n")
    with pytest.raises(CorpusError, match=r"no documents in .*blank\.txt"):
        list(iter_corpus([blank]))
    with pytest.raises(CorpusError, match="listed twice"):
        list_sources([blank, tmp_path])
    (tmp_path.parent / f"{tmp_path.name}-link.txt").symlink_to(blank)
    with pytest.raises(CorpusError, match="listed twice"):
        list_sources([blank, tmp_path.parent / f"{tmp_path.name}-link.txt"])
    with pytest.raises(CorpusError, match="unknown ending"):
        list_sources([_write(tmp_path, "a.pdf", b"")])
    with pytest.raises(CorpusError, match="unknown ending"):
        list(iter_documents(tmp_path / "a.pdf"))


@pytest.mark.parametrize("ending", list(PACKERS))
@pytest.mark.parametrize("separator", ["blank_line", "file"])
def test_invalid_utf8_names_file_and_offset(tmp_path: Path, ending: str, separator: str) -> None:
    good = "né\n\nmore\n".encode()
    path = _write(tmp_path, "a.txt" + ending, b"\xef\xbb\xbf" + good + b"ab\xffcd\n")
    with pytest.raises(
        CorpusError, match=rf"invalid UTF-8 at byte offset {3 + len(good) + 2} \(line 4\)"
    ) as caught:
        list(iter_documents(path, CorpusOptions(separator)))  # type: ignore[arg-type]
    assert str(path) in str(caught.value)


def test_invalid_utf8_right_after_a_byte_order_mark(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.txt", b"\xef\xbb\xbf\xff")
    with pytest.raises(CorpusError, match="byte offset 3 "):
        list(iter_documents(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"body": "x"}', "no key 'text'"),
        (b'["text"]', "no key 'text'"),
        (b'{"text": 1}', "is int, not a string"),
        (b'{"text": "a\\ud800"}', "surrogate pair at character 1"),
    ],
)
def test_bad_json_line_names_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = _write(tmp_path, "a.jsonl", b'{"text": "x"}\n\n' + line + b"\n")
    with pytest.raises(CorpusError, match=rf"a\.jsonl, line 3: .*{message}"):
        list(iter_documents(path))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_truncated_archive_is_noticed_wherever_it_is_cut(tmp_path: Path, ending: str) -> None:
    path = _write(tmp_path, "a.txt" + ending, "".join(f"line {n}\n\n" for n in range(500)).encode())
    whole = path.read_bytes()
    for size in [1, 5, 12, len(whole) // 2, len(whole) - 5, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CorpusError, match=rf"a\.txt{ending}: damaged or truncated archive"):
            list(iter_documents(path))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damaged_archive_is_noticed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / ("a.txt" + ending)
    path.write_bytes(b"this is not an archive")
    with pytest.raises(CorpusError, match="damaged or truncated archive"):
        list(iter_documents(path))
    whole = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(TEXT.encode() * 9))
    if ending == ".gz":
        whole = bytearray(gzip.compress(TEXT.encode() * 9))
    whole[len(whole) // 2] ^= 0x55
    path.write_bytes(bytes(whole))
    with pytest.raises(CorpusError, match="damaged or truncated archive"):
        list(iter_documents(path))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_archive_of_several_members(tmp_path: Path, ending: str) -> None:
    path = tmp_path / ("a.txt" + ending)
    pack = PACKERS[ending]
    parts = ["".join(f"{start + n}\n\n" for n in range(4000)) for start in (0, 4000)]
    path.write_bytes(pack(parts[0].encode()) + pack(parts[1].encode()))
    assert list(iter_documents(path)) == [str(n) for n in range(8000)]


def test_longest_document_is_bounded(tmp_path: Path) -> None:
    path = _write(tmp_path, "a.txt", b"12345\n67890\n\nabc")
    assert list(iter_documents(path, CorpusOptions(max_document_bytes=12))) == ["12345\n67890", "abc"]
    whole = CorpusOptions("file", max_document_bytes=16)
    assert list(iter_documents(path, whole)) == ["12345\n67890\n\nabc"]
    with pytest.raises(CorpusError, match="max_document_bytes = 15"):
        list(iter_documents(path, CorpusOptions("file", max_document_bytes=15)))
    with pytest.raises(CorpusError, match="max_document_bytes = 11"):
        list(iter_documents(path, CorpusOptions(max_document_bytes=11)))
    with pytest.raises(CorpusError, match="line 1: longer than max_document_bytes = 4"):
        list(iter_documents(path, CorpusOptions(max_document_bytes=4)))


@pytest.mark.parametrize(
    "fields", [{"document_separator": "line"}, {"text_key": ""}, {"max_document_bytes": 0}]
)
def test_bad_options_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        CorpusOptions(**fields)  # type: ignore[arg-type]


def test_chapters_become_documents() -> None:
    verses = ["Ge1:1 In the beginning", "Ge1:2 And", "Ge2:1 Thus", "1Sa2:1 And Hannah"]
    assert chapters(verses) == ["In the beginning\nAnd", "Thus", "And Hannah"]
    with pytest.raises(CorpusError, match="not a verse"):
        chapters(["In the beginning"])


def test_every_twentieth_chapter_is_held_out() -> None:
    train, heldout = split([str(n) for n in range(1, 46)])
    assert heldout == ["20", "40"]
    assert len(train) == 43 and "20" not in train


def _fake_bible(folder: Path, num_verses: int) -> str:
    program = folder / "bible"
    script = f'#!/bin/sh\n[ "$1" = -f ] || exit 9\nseq {num_verses} | sed "s/^/Ps/; s/$/:1 word/"\n'
    program.write_text(script, encoding="utf-8")
    program.chmod(0o755)
    return str(program)


def test_demo_corpus_reads_back_as_documents(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    counts = write_demo_corpus(output, _fake_bible(tmp_path, 31102))
    assert counts == {"train.txt": 31102 - 1555, "heldout.txt": 1555}
    for name, count in counts.items():
        assert len(list(iter_corpus([output / name]))) == count
    assert sorted(path.name for path in output.iterdir()) == ["heldout.txt", "train.txt"]


def test_a_full_disk_leaves_the_old_demo_corpus_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text("old", encoding="utf-8")
    monkeypatch.setattr("training.data.demo_corpus.read_bible", lambda _: ["Ge1:1 In the beginning"])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path)])
    assert caught.value.code == 1
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "train.txt").read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]


def test_missing_or_incomplete_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorpusError, match="gave 7 verses and exit code 0, expected 31102"):
        read_bible(_fake_bible(tmp_path, 7))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(CorpusError, match="install the Debian package bible-kjv"):
        read_bible()
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path / "out")])
    assert caught.value.code == 1
    assert not (tmp_path / "out").exists()
