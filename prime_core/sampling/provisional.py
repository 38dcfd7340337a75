"""Rows that are not finished, made readable: what is known of every token, as text or as a picture.

Shapes: L tokens, S digits a token, H and W pixels high and wide, C channels, P positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.pixels import PixelCodec
from prime_core.tokenizer import Tokenizer

UNKNOWN = "\N{LIGHT SHADE}"
"""Stands for a token some of whose digits are masked."""


class ProvisionalText(NamedTuple):
    """A row of text in the middle of sampling.

    Attributes:
        text: the tokens whose digits are all known, decoded together run by run; `UNKNOWN` for every other one.
        pieces: (P,) the text of each token that was asked for; None where it is not known yet.
        revealed: (P,) the share of its digits that are known, 0 to 1.
    """

    text: str
    pieces: list[str | None]
    revealed: list[float]


def provisional_text(
    codec: SubtokenCodec, tokenizer: Tokenizer | None, y: Tensor, positions: Tensor
) -> ProvisionalText:
    """Render a row of text whose digits are partly masked.

    Args:
        codec: tokens to digits.
        tokenizer: of the model; None if it has none, and then the text is empty and no piece is known.
        y: (L, S) int64, digits in 0..b-1, or b where masked.
        positions: (P,) the tokens to tell of one by one.
    """
    visible = y != codec.mask_index
    revealed = visible[positions].float().mean(-1).tolist()
    if tokenizer is None:
        return ProvisionalText("", [None] * len(positions), revealed)
    known = visible.all(-1)
    tokens = codec.decode(y.masked_fill(~known[:, None], 0)).tolist()
    runs: list[str] = []
    ids: list[int] = []
    for token, is_known in zip(tokens, known.tolist(), strict=True):
        if is_known:
            ids.append(token)
            continue
        runs += [_text_of(tokenizer, ids), UNKNOWN]
        ids = []
    return ProvisionalText(
        text="".join([*runs, _text_of(tokenizer, ids)]),
        pieces=[_text_of(tokenizer, [tokens[p]]) if known[p] else None for p in positions.tolist()],
        revealed=revealed,
    )


def provisional_pixels(codec: SubtokenCodec, pixels: PixelCodec, y: Tensor) -> Tensor:
    """Render an image whose digits are partly masked: every masked digit as the middle of its range.

    A pixel with nothing known is a middle grey, and one with its high digit known has the middle of the values that
    are left. Where codes are permuted a digit says nothing of the size, and a pixel is shown once it is known.

    Args:
        codec: tokens to digits.
        pixels: pixels to tokens.
        y: (L, S) int64, digits in 0..b-1, or b where masked.

    Returns:
        (H, W, C) uint8.
    """
    masked = y == codec.mask_index
    known = ~masked.any(-1)
    zeroed = y.masked_fill(masked, 0)
    if codec.permutation is not None:
        tokens = codec.decode(zeroed.masked_fill(~known[:, None], 0))
        return pixels.decode(torch.where(known, tokens, codec.vocab_size // 2))
    middles = ((codec.base - 1) * masked * codec.place_values).sum(-1) // 2
    codes = (zeroed * codec.place_values).sum(-1) + middles
    return pixels.decode(codes.clamp(max=codec.vocab_size - 1))


def _text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    raw = tokenizer.decode_bytes(token for token in ids if token < tokenizer.vocab_size)
    return raw.decode("utf-8", errors="replace")
