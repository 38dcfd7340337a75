"""BPE training: the textbook algorithm as the specification, and agreement with the encoder that reads it."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_core.tokenizer import END_OF_TEXT, Tokenizer, TokenizerSpec, load_tokenizer
from training.data.bpe import count_pieces, main, merge_token, train_ranks, train_tokenizer

TEXT = "the cat and the hat and the bat sat; then they ate that.\nhello   world 1234 1234's\n" * 3


def plain_bpe(pieces: Counter[bytes], num_merges: int) -> list[bytes]:
    """Recounts everything after each merge: slow and evident."""
    words = {piece: [bytes([value]) for value in piece] for piece in pieces}
    tokens: list[bytes] = []
    while len(tokens) < num_merges:
        counts: Counter[bytes] = Counter()
        for piece, word in words.items():
            for left, right in pairwise(word):
                counts[left + right] += pieces[piece]
        candidates = {token: count for token, count in counts.items() if count >= 2}
        if not candidates:
            break
        token = min(candidates, key=lambda candidate: (-candidates[candidate], candidate))
        tokens.append(token)
        words = {piece: encode_piece(piece, tokens) for piece in words}
    return tokens


def encode_piece(piece: bytes, tokens: list[bytes]) -> list[bytes]:
    """Merges, as the encoder does, always the pair of lowest rank."""
    word = [bytes([value]) for value in piece]
    while True:
        known = [left + right for left, right in pairwise(word) if left + right in tokens]
        if not known:
            return word
        word = merge_token(word, min(known, key=tokens.index))


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=12), st.integers(1, 5), min_size=1, max_size=8),
    st.integers(1, 12),
)
def test_agrees_with_plain_bpe(words: dict[str, int], num_merges: int) -> None:
    pieces = Counter({word.encode(): count for word, count in words.items()})
    expected = plain_bpe(pieces, num_merges)
    assert train_ranks(pieces, 256 + len(expected))[256:] == expected
    if len(expected) < num_merges:
        with pytest.raises(ValueError, match=f"only {256 + len(expected)} of"):
            train_ranks(pieces, 256 + num_merges)


def test_encoder_agrees_with_training() -> None:
    ranks, tokenizer = train_tokenizer([TEXT], 290)
    tokens = ranks[256:]
    for piece in count_pieces([TEXT]):
        expected = [ranks.index(token) for token in encode_piece(piece, tokens)]
        assert tokenizer.encode(piece.decode()) == expected


def test_ties_go_to_the_smaller_bytes_and_order_of_input_is_irrelevant() -> None:
    assert train_ranks(Counter({b"xy": 2, b"ab": 2}), 258)[256:] == [b"ab", b"xy"]
    documents = ["the cat", "the hat sat", "a cat sat that"]
    assert train_tokenizer(documents, 262)[0] == train_tokenizer(documents[::-1], 262)[0]


def test_merge_token_joins_from_left_to_right() -> None:
    assert merge_token([b"a", b"a", b"a"], b"aa") == [b"aa", b"a"]
    assert merge_token([b"a", b"bc", b"ab", b"c"], b"abc") == [b"abc", b"abc"]


def test_pieces_do_not_cross_words() -> None:
    assert count_pieces(["don't  go 42\n"]) == Counter(
        {b"don": 1, b"'t": 1, b" ": 1, b" go": 1, b" 42": 1, b"\n": 1}
    )


def test_last_id_ends_the_text() -> None:
    ranks, tokenizer = train_tokenizer([TEXT], 280)
    assert len(ranks) == 279
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (280, 279)
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
    with pytest.raises(ValueError, match="vocab_size is 256: give at least 257"):
        train_tokenizer([TEXT], 256)
    with pytest.raises(ValueError, match="num_ranks is 255"):
        train_ranks(Counter(), 255)


def test_command_writes_a_loadable_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    output = tmp_path / "new" / "tokenizer.tiktoken"
    assert main(["--input", str(tmp_path / "text.txt"), "--vocab-size", "280", "--output", str(output)]) == 0
    assert "vocab_size 280" in capsys.readouterr().out
    spec = TokenizerSpec(kind="tiktoken_file", file=output.name, special_tokens={END_OF_TEXT: 279})
    loaded = load_tokenizer(spec, output.parent)
    assert isinstance(loaded, Tokenizer)
    # The command reads documents, which do not end in a line feed.
    assert loaded.fingerprint == train_tokenizer([TEXT.rstrip("\n")], 280)[1].fingerprint


def test_command_reports_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--input", str(tmp_path / "no.txt"), "--vocab-size", "280", "--output", str(tmp_path / "out")])
    assert caught.value.code == 1
    assert "no such file" in capsys.readouterr().err
