"""Tokenizer: round trips, special tokens as plain text, and a clear error for every broken file."""

import base64
import hashlib
import inspect
import json
from pathlib import Path

import pytest
import tiktoken_ext.openai_public
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prime_core.rank_files import read_gpt2_ranks, read_rank_file, write_rank_file
from prime_core.tokenizer import (
    _GPT2_FILES,
    END_OF_TEXT,
    Tokenizer,
    TokenizerError,
    TokenizerSpec,
    load_tokenizer,
)

RANKS = [bytes([value]) for value in range(256)] + [b"th", b"the", b" the", b"an", b"and"]
TOKENIZER = Tokenizer(RANKS, {END_OF_TEXT: 261})
SPEC = TokenizerSpec(kind="tiktoken_file", file="ranks.tiktoken", special_tokens={END_OF_TEXT: 261})
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def test_encode_merges_lowest_rank_first() -> None:
    assert TOKENIZER.encode("the and the") == [257, 32, 260, 258]
    assert TOKENIZER.encode("") == []


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert all(0 <= index < TOKENIZER.vocab_size and index != 261 for index in ids)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode_bytes(ids) == text.encode()


def test_special_tokens_are_plain_text_when_encoding_and_nothing_when_decoding() -> None:
    assert (TOKENIZER.vocab_size, TOKENIZER.eos_id) == (262, 261)
    ids = TOKENIZER.encode(f"a{END_OF_TEXT}b")
    assert 261 not in ids
    assert TOKENIZER.decode(ids) == f"a{END_OF_TEXT}b"
    assert TOKENIZER.decode([97, 261, 98]) == "ab"
    assert Tokenizer(RANKS, {}).eos_id is None


def test_partial_character_decodes_to_replacement() -> None:
    assert TOKENIZER.decode_bytes([0xC3]) == b"\xc3"
    assert TOKENIZER.decode([0xC3]) == "\ufffd"


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_pieces_are_together_what_decodes(ids: list[int]) -> None:
    pieces = TOKENIZER.decode_pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


def test_the_token_that_completes_a_character_has_it() -> None:
    assert TOKENIZER.decode_pieces([*"aé".encode(), 260, 261, 258]) == ["a", "", "é", "and", "", " the"]
    assert TOKENIZER.decode_pieces([0xC3, 97]) == ["", "\ufffda"]
    assert TOKENIZER.decode_pieces([97, 0xC3]) == ["a", "\ufffd"]


def test_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogate pair at character 2"):
        TOKENIZER.encode("ab\ud800")


@pytest.mark.parametrize("index", [-1, 262])
def test_id_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {index} is outside 0\.\.261"):
        TOKENIZER.decode([97, index])


def test_fingerprint_depends_on_every_part() -> None:
    others = [
        Tokenizer(RANKS[:-1], {END_OF_TEXT: 260}),
        Tokenizer(RANKS, {}),
        Tokenizer(RANKS, {"<|end|>": 261}),
        Tokenizer([*RANKS[:-1], b"ad"], {END_OF_TEXT: 261}),
        Tokenizer(RANKS, {END_OF_TEXT: 261}, pattern=r"\s|\S+"),
    ]
    assert len({TOKENIZER.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert Tokenizer(RANKS, {END_OF_TEXT: 261}).fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize(
    ("pattern", "message"), [("[a-z]+", "passes some characters over"), ("(", "does not work")]
)
def test_bad_pattern_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(RANKS, {}, pattern)


@pytest.mark.parametrize("ids", [{"a": 262}, {"a": 260}, {"a": 261, "b": 263}])
def test_special_ids_that_do_not_follow_the_ranks_are_refused(ids: dict[str, int]) -> None:
    with pytest.raises(
        TokenizerError, match="261 ranks, so the special tokens must have the ids from 261 on"
    ):
        Tokenizer(RANKS, ids)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "tiktoken_file"},
        {"kind": "tiktoken_file", "file": "../ranks"},
        {"kind": "tiktoken_file", "file": "a/b"},
        {"kind": "tiktoken_file", "file": "a\\b"},
        {"kind": "tiktoken_file", "file": "C:ranks"},
        {"kind": "tiktoken_file", "file": "a\0b"},
        {"kind": "tiktoken_file", "file": ".."},
        {"kind": "tiktoken_file", "file": ""},
        {"kind": "tiktoken_file", "file": "r", "special_tokens": {"a": 300, "b": 300}},
        {"kind": "tiktoken_file", "file": "r", "special_tokens": {"a": 3}},
        {"kind": "tiktoken_file", "file": "r", "special_tokens": {"": 300}},
        {"kind": "tiktoken_file", "file": "r", "special_tokens": {"a": "300"}},
        {"kind": "tiktoken_file", "file": "r", "pattern": ""},
        {"kind": "tiktoken_file", "file": "r", "unknown": 1},
        {"kind": "gpt2", "file": "r"},
        {"kind": "gpt2", "pattern": "."},
        {"kind": "gpt2", "special_tokens": {END_OF_TEXT: 300}},
        {"kind": "none", "special_tokens": {"a": 300}},
        {"kind": "other"},
    ],
)
def test_bad_spec_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TokenizerSpec.model_validate(fields)


def test_load_from_rank_file(tmp_path: Path) -> None:
    write_rank_file(tmp_path / "ranks.tiktoken", RANKS)
    spec = TokenizerSpec.model_validate_json(SPEC.model_dump_json())
    loaded = load_tokenizer(spec, tmp_path)
    assert loaded is not None
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.encode("the") == [257]
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.tiktoken"]


def test_kind_none_has_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(TokenizerSpec(kind="none"), tmp_path) is None


def test_missing_rank_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ranks\.tiktoken is missing"):
        load_tokenizer(SPEC, tmp_path)


def _lines() -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(RANKS)]


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (10, b"!!!! 9", "line 10: bad base64"),
        (10, b"CQ 9", "line 10: bad base64"),
        (10, b"CQ==", "line 10: expected 'base64 rank'"),
        (10, b"CQ== 9 9", "line 10: expected 'base64 rank'"),
        (10, b"CQ== -9", "line 10: expected 'base64 rank'"),
        (10, b"", "line 10: expected 'base64 rank'"),
        (10, b" 9", "line 10: the token is empty"),
        (10, b"CQ== 8", "line 10: rank 8, expected 9"),
        (10, b"CQ== 10", "line 10: rank 10, expected 9"),
        (10, b"CQ== 09", "line 10: rank 09, expected 9"),
        (261, b"dGg= 260", "line 261: token b'th' is already on line 257"),
        (10, b"enp6eg== 9", r"1 of the 256 single bytes have no rank, the first is 0x09"),
    ],
)
def test_broken_rank_file_names_file_and_line(tmp_path: Path, number: int, line: bytes, message: str) -> None:
    lines = _lines()
    lines[number - 1] = line
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(SPEC, tmp_path)
    assert str(caught.value).startswith(str(path))


def test_every_truncation_of_a_rank_file_is_noticed(tmp_path: Path) -> None:
    whole = b"\n".join(_lines()) + b"\n"
    path = tmp_path / "ranks.tiktoken"
    for size in [0, 1, 700, *range(len(whole) - 40, len(whole) - 1)]:
        path.write_bytes(whole[:size])
        with pytest.raises(TokenizerError, match=r"truncated|expected") as caught:
            load_tokenizer(SPEC, tmp_path)
        assert str(path) in str(caught.value)
    path.write_bytes(whole[:-1])
    assert read_rank_file(path) == RANKS


def _gpt2_files() -> tuple[str, str]:
    """GPT-2's files with other merges: 50000 pairs of bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = [chr(value) for value in printable] + [
        chr(0x100 + index) for index in range(256 - len(printable))
    ]
    pairs = [(left, right) for left in names for right in names][: 50256 - 256]
    ids = {name: rank for rank, name in enumerate([*names, *(left + right for left, right in pairs)])}
    merges = "".join(f"{left} {right}\n" for left, right in pairs)
    return "#version: 0.2\n" + merges, json.dumps(ids | {END_OF_TEXT: 50256})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_published_hashes() -> None:
    library = inspect.getsource(tiktoken_ext.openai_public.gpt2)
    assert len(_GPT2_FILES) == 2
    for digest in _GPT2_FILES.values():
        assert f'"{digest}"' in library


def test_gpt2_from_folder_and_from_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, encoder = _gpt2_files()
    monkeypatch.setitem(_GPT2_FILES, "vocab.bpe", _sha256(vocab))
    monkeypatch.setitem(_GPT2_FILES, "encoder.json", _sha256(encoder))
    folder, cache = tmp_path / "folder", tmp_path / "cache"
    folder.mkdir()
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    for name, text in (("vocab.bpe", vocab), ("encoder.json", encoder)):
        with pytest.raises(FileNotFoundError, match=f"{name} not found.*never downloaded"):
            load_tokenizer(TokenizerSpec(kind="gpt2"), folder)
        (cache / hashlib.sha1((URL + name).encode()).hexdigest()).write_text(text, encoding="utf-8")
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(folder))  # the other variable comes first
    cached = load_tokenizer(TokenizerSpec(kind="gpt2"), folder)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    with pytest.raises(FileNotFoundError, match=rf"now {folder}\)"):
        load_tokenizer(TokenizerSpec(kind="gpt2"), folder)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(FileNotFoundError, match="now empty"):
        load_tokenizer(TokenizerSpec(kind="gpt2"), folder)
    local = load_tokenizer(TokenizerSpec(kind="gpt2"), tmp_path)
    assert cached is not None and local is not None
    assert cached.fingerprint == local.fingerprint
    assert (local.vocab_size, local.eos_id) == (50257, 50256)
    assert local.decode_bytes([0, 93, 94, 188, 220, 255]) == b"!~\xa1\x00 \xad"
    assert local.encode("!!") == [256]
    assert local.decode(local.encode("naïve 中 \x00")) == "naïve 中 \x00"


def test_gpt2_files_of_another_hash_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, encoder = _gpt2_files()
    (tmp_path / "vocab.bpe").write_text(vocab, encoding="utf-8")
    (tmp_path / "encoder.json").write_text(encoder, encoding="utf-8")
    with pytest.raises(
        TokenizerError, match=rf"vocab\.bpe: SHA-256 is {_sha256(vocab)}, expected 1ce1664773c5"
    ):
        load_tokenizer(TokenizerSpec(kind="gpt2"), tmp_path)
    monkeypatch.setitem(_GPT2_FILES, "vocab.bpe", _sha256(vocab))
    with pytest.raises(
        TokenizerError, match=r"encoder\.json: SHA-256 is .*, expected 196139668be6.* replace it"
    ):
        load_tokenizer(TokenizerSpec(kind="gpt2"), tmp_path)


def test_broken_gpt2_files(tmp_path: Path) -> None:
    vocab, encoder = _gpt2_files()
    vocab_file, encoder_file = tmp_path / "vocab.bpe", tmp_path / "encoder.json"
    cases = [
        (vocab.replace("! #\n", "!\n", 1), encoder, r"vocab\.bpe, line \d+: expected two tokens"),
        (vocab.replace("! #\n", "! \u4e2d\n", 1), encoder, r"vocab\.bpe, line \d+: expected two tokens"),
        (vocab.replace("! #\n", "", 1), encoder, r"encoder\.json: token .* has id"),
        (vocab, encoder[:-5], r"encoder\.json: not valid JSON"),
        (vocab, "[]", r"encoder\.json: expected one JSON object"),
    ]
    for vocab_text, encoder_text, message in cases:
        vocab_file.write_text(vocab_text, encoding="utf-8")
        encoder_file.write_text(encoder_text, encoding="utf-8")
        with pytest.raises(TokenizerError, match=message):
            read_gpt2_ranks(vocab_file, encoder_file, (_sha256(vocab_text), _sha256(encoder_text)))
    vocab_file.write_bytes(b"a\xff")
    with pytest.raises(TokenizerError, match="invalid UTF-8 at byte offset 1"):
        read_gpt2_ranks(vocab_file, encoder_file, (hashlib.sha256(b"a\xff").hexdigest(), ""))


def test_ranks_without_a_byte_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="0x00"):
        write_rank_file(tmp_path / "x", RANKS[1:])
    with pytest.raises(TokenizerError, match="two ranks"):
        write_rank_file(tmp_path / "x", [*RANKS, b"th"])
    assert list(tmp_path.iterdir()) == []
