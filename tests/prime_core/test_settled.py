"""Text that is settled early is never taken back, and all of it is settled in the end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prime_core.codec import SubtokenCodec
from prime_core.sampling.canvas import Canvas, text_canvas
from prime_core.sampling.render import render
from prime_core.sampling.settled import known_ids, settled_text
from prime_core.tokenizer import Tokenizer

EOS = 256
TOKENIZER = Tokenizer([bytes([value]) for value in range(256)], {"<|endoftext|>": EOS})
CODEC = SubtokenCodec(vocab_size=258, target_length=2)


def canvas_of(length: int, suffix: str | None = None) -> Canvas:
    return text_canvas(TOKENIZER, CODEC, 1000, suffix=suffix, max_tokens=length)


def settled(ids: Sequence[int], stop: Sequence[str] = (), suffix: str | None = None) -> str:
    return settled_text(canvas_of(10, suffix), ids, TOKENIZER, stop)


@pytest.mark.parametrize(
    ("raw", "stop", "expected"),
    [
        (b"", ["a"], ""),
        (b"one tw", [], "one tw"),
        (b"one tw", ["two"], "one "),
        (b"one two", ["two"], "one "),
        (b"one tw.", ["two"], "one tw."),
        (b"abcd", ["abcde", "cd"], ""),  # the longer one may still come, and would cut before the shorter
        (b"abcdx", ["abcde", "cd"], "ab"),
        (b"aab", ["aac", "aabc"], ""),
        (b"caf\xc3", [], "caf"),
        (b"caf\xc3\xa9", [], "caf\u00e9"),
        (b"\xf0\x9f\x98", [], ""),
        (b"\xc3(", [], "\ufffd("),
        (b"x\xc3\xa9", ["\u00e9t\u00e9"], "x"),
        (b"x\xc3", ["\u00e9t\u00e9"], "x"),
    ],
)
def test_text_before_what_may_still_be_cut(raw: bytes, stop: list[str], expected: str) -> None:
    assert settled(list(raw), stop) == expected


def test_an_end_of_text_settles_everything() -> None:
    assert settled([*b"one tw", EOS, *b"x"], ["two"]) == "one tw"
    assert settled([*b"caf\xc3", EOS]) == "caf\ufffd"
    assert settled([*b"a", EOS, *b"b"], suffix="c") == "ab"  # a closed gap is not cut


PIECES = st.one_of(st.sampled_from([*b"ab", EOS, 257]), st.sampled_from(list("é\U0001f600".encode())))


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(PIECES, min_size=1, max_size=12),
    stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    closed=st.booleans(),
)
@example(ids=list(b"abab"), stop=["abb", "ba"], closed=False)
def test_what_is_settled_only_grows_into_the_final_text(
    ids: list[int], stop: list[str], closed: bool
) -> None:
    canvas = canvas_of(len(ids), "z" if closed else None)
    stop = [] if closed else stop
    x_0 = torch.tensor(ids + [ord("z")] * closed)
    final = render(canvas, x_0, TOKENIZER, stop).gaps[0]
    texts = [settled_text(canvas, ids[:num], TOKENIZER, stop) for num in range(len(ids) + 1)] + [final]
    for earlier, later in itertools.pairwise(texts):
        assert later.startswith(earlier)
    longest = max([len(item.encode()) for item in stop] + [4])
    assert (
        len(final.encode()) - len(texts[-2].encode("utf-8")) < longest + 3 * 4
    )  # held back: one stop string


def test_known_ids_end_at_the_first_masked_digit() -> None:
    y = CODEC.encode(torch.tensor([5, 6, 7, 8]))
    assert known_ids(CODEC, y) == [5, 6, 7, 8]
    y[2, 1] = CODEC.mask_index
    assert known_ids(CODEC, y) == [5, 6]
    y[0, 0] = CODEC.mask_index
    assert known_ids(CODEC, y) == []
