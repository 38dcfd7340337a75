"""The text that the tokens known so far make certain: what a stream from left to right may send.

Tokens become known in any order. From the left end of a gap up to its first unknown token the text stands, but for
what may still be cut off by a stop string, and for the bytes of a character that is not complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.sampling.canvas import Canvas
from prime_core.sampling.render import bytes_of
from prime_core.tokenizer import Tokenizer


def known_ids(codec: SubtokenCodec, y: Tensor) -> list[int]:
    """Return the tokens from the left end up to the first one with a masked digit.

    Args:
        codec: tokens to digits.
        y: (L, S) int64, digits in 0..b-1, or b where masked.
    """
    num_known = int((y != codec.mask_index).all(-1).long().cumprod(0).sum())
    return [int(token) for token in codec.decode(y[:num_known])]


def settled_text(canvas: Canvas, ids: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> str:
    """Return the text that a gap begins with, whatever the tokens behind its known ones will be.

    It is a prefix of what `prime_core.sampling.render.render` gives for the gap in the end, and of every later value.

    Args:
        canvas: the canvas of the row.
        ids: the known tokens at the left end of the gap.
        tokenizer: of the model.
        stop: the stop strings of the request.
    """
    ended = False
    if canvas.open_ended and tokenizer.eos_id is not None and tokenizer.eos_id in ids:
        ids, ended = ids[: ids.index(tokenizer.eos_id)], True
    raw = bytes_of(ids, tokenizer)
    cuts = [_earliest_cut(raw, item.encode(), ended=ended) for item in stop] if canvas.open_ended else []
    certain = raw[: min(cuts, default=len(raw))]
    return codecs.getincrementaldecoder("utf-8")("replace").decode(certain, final=ended)


def _earliest_cut(raw: bytes, stop: bytes, *, ended: bool) -> int:
    """Return where a stop string may cut ``raw``: where it is, or where it may have begun if more bytes follow."""
    found = raw.find(stop)
    if found >= 0:
        return found
    start = len(raw) if ended else raw.find(stop[:1], max(0, len(raw) - len(stop) + 1))
    while 0 <= start < len(raw):
        if stop.startswith(raw[start:]):
            return start
        start = raw.find(stop[:1], start + 1)
    return len(raw)
