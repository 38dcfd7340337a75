"""From the tokens of a finished row to text. Shapes: L tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from prime_core.sampling.canvas import Canvas, check_stop
from prime_core.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A finished row as text.

    Attributes:
        text: the fixed parts verbatim with the decoded gaps between them; None without a tokenizer.
        gaps: the text of every gap; empty without a tokenizer.
        token_ids: all tokens, up to where the text ends.
        finish_reason: "stop" if an end-of-text token or a stop string ended the text, else "length".
    """

    text: str | None
    gaps: list[str]
    token_ids: list[int]
    finish_reason: FinishReason


def render(canvas: Canvas, x_0: Tensor, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> Rendered:
    """Turn the tokens of a finished row into text.

    Every part is decoded on its own, and bytes that are no UTF-8 become U+FFFD, so fixed parts stay intact.
    The gap of an open-ended canvas ends before its first end-of-text token, then before the first stop
    string. Elsewhere nothing is cut, and special tokens stand for no text.

    Args:
        canvas: the canvas the row was sampled on.
        x_0: (L,) tokens.
        tokenizer: tokenizer of the model, or None.
        stop: stop strings.

    Raises:
        CanvasError: if the stop strings do not fit, see `check_stop`.
    """
    check_stop(canvas, stop, tokenizer)
    tokens = x_0.tolist()
    if tokenizer is None:
        return Rendered(None, [], tokens, "length")
    pieces, gaps, token_ids = [], [], []
    finish_reason: FinishReason = "length"
    for segment in canvas.segments:
        ids = tokens[segment.start : segment.stop]
        text = segment.text
        if segment.gap and canvas.open_ended:
            ids, text, finish_reason = _cut(ids, tokenizer, stop)
        elif text is None:
            text = bytes_of(ids, tokenizer).decode("utf-8", errors="replace")
        pieces.append(text)
        token_ids += ids
        if segment.gap:
            gaps.append(text)
    return Rendered("".join(pieces), gaps, token_ids, finish_reason)


def _cut(ids: list[int], tokenizer: Tokenizer, stop: Sequence[str]) -> tuple[list[int], str, FinishReason]:
    """Cut the gap of an open-ended canvas: (tokens that the text needs, text, finish reason)."""
    finish_reason: FinishReason = "length"
    if tokenizer.eos_id is not None and tokenizer.eos_id in ids:
        ids, finish_reason = ids[: ids.index(tokenizer.eos_id)], "stop"
    raw = bytes_of(ids, tokenizer)
    # UTF-8 cannot match in the middle of a character, so the search can run on bytes and know where tokens
    # end.
    found = [at for at in (raw.find(item.encode()) for item in stop) if at >= 0]
    if found:
        finish_reason = "stop"
        raw = raw[: min(found)]
        kept, num_bytes = 0, 0
        while num_bytes < len(raw):
            num_bytes += len(bytes_of(ids[kept : kept + 1], tokenizer))
            kept += 1
        ids = ids[:kept]
    return ids, raw.decode("utf-8", errors="replace"), finish_reason


def bytes_of(ids: Sequence[int], tokenizer: Tokenizer) -> bytes:
    """Bytes of some tokens. A network may have more outputs than its tokenizer has ids: those stand for no text."""
    return tokenizer.decode_bytes(token for token in ids if token < tokenizer.vocab_size)
