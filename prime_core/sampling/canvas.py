"""The canvas of a request: what is known and what is free.

A canvas is a row of digits with ``mask_index`` at every free digit, cut into segments: fixed parts, whose
text is given back verbatim, and gaps, whose tokens are sampled. Shapes: L tokens, S digits a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.integers import holds_integers, is_integer
from prime_core.tokenizer import Tokenizer

Tokens = str | Sequence[int] | Tensor | NDArray[np.integer[Any]]
"""A text, or token ids: a list, or a tensor or an array of one dimension."""

Numbers = Tensor | NDArray[Any]


class CanvasError(ValueError):
    """A request that fits no canvas; ``param`` names the field of the request that is wrong."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``start:stop`` of a row: a gap, or a fixed part with its text (None: decode its tokens)."""

    start: int
    stop: int
    gap: bool
    text: str | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Canvas:
    """A row before sampling.

    Attributes:
        y: (L, S) int64, digits in 0..b-1, or ``mask_index`` where free.
        mask_index: b.
        segments: in order, from token 0 to token L.
        open_ended: a prompt and nothing behind its gap, so text may end early: at the end-of-text token or at
            a stop string.
    """

    y: Tensor
    mask_index: int
    segments: tuple[Segment, ...]
    open_ended: bool

    @property
    def length(self) -> int:
        """Number of tokens L."""
        return len(self.y)

    @property
    def free(self) -> Tensor:
        """(L, S) bool: the digits to sample."""
        return self.y == self.mask_index


Template = Sequence[str | int | Mapping[str, int]]
# A fixed part (its tokens, its text) or a gap (its number of tokens).
_Part = tuple[Sequence[int], str | None] | int


def text_canvas(
    tokenizer: Tokenizer | None,
    codec: SubtokenCodec,
    context: int,
    *,
    prompt: Tokens | None = None,
    suffix: Tokens | None = None,
    template: Template | None = None,
    max_tokens: int | None = None,
) -> Canvas:
    """Lay out a text request: prompt + gap + suffix, or a template.

    Args:
        tokenizer: tokenizer of the model, None if it has none (then only a prompt of token ids fits).
        codec: tokens to digits.
        context: largest number of tokens of a row.
        prompt: text or token ids before the gap; None or empty for none.
        suffix: text or token ids after the gap; None or empty for none.
        template: strings and gaps in order, a gap as `{"gap": number_of_tokens}` or as the number alone.
        max_tokens: tokens of the gap, at least 1; None fills what the context leaves.

    Raises:
        CanvasError: a part does not fit, contradicts another one, or is not text.
    """
    if template is not None:
        for param, value in (("prompt", prompt), ("suffix", suffix), ("max_tokens", max_tokens)):
            if value is not None:
                raise CanvasError(
                    param, f"{param} and template exclude each other: a template fixes the whole layout"
                )
        parts = _template_parts(tokenizer, codec, context, template)
    else:
        parts = _prompt_parts(tokenizer, codec, context, prompt, suffix, max_tokens)
    total = _num_tokens(parts)
    y = torch.full((total, codec.target_length), codec.mask_index)
    segments, start = [], 0
    for part in parts:
        if isinstance(part, int):
            stop = start + part
            segments.append(Segment(start, stop, gap=True))
        else:
            stop = start + len(part[0])
            y[start:stop] = codec.encode(torch.tensor(part[0], dtype=torch.int64))
            segments.append(Segment(start, stop, gap=False, text=part[1]))
        start = stop
    return Canvas(
        y, codec.mask_index, tuple(segments), open_ended=template is None and isinstance(parts[-1], int)
    )


def digits_canvas(codec: SubtokenCodec, y: Numbers) -> Canvas:
    """Lay out known digits; gaps are the runs of tokens that are not fully known.

    Args:
        codec: tokens to digits.
        y: (L, S) integers, digits in 0..b-1, or b where free.

    Raises:
        CanvasError: if the shape or a value is wrong, or the digits of a token agree with no token.
    """
    y = as_tensor(y)
    if not isinstance(y, Tensor):
        raise CanvasError("y", f"y must be a tensor of digits, got {type(y).__name__}")
    if y.ndim != 2 or y.shape[1] != codec.target_length or len(y) < 1:
        raise CanvasError(
            "y", f"y must be (tokens, {codec.target_length}) digits, got shape {tuple(y.shape)}"
        )
    if not holds_integers(y):
        raise CanvasError("y", f"y must hold integers, got {y.dtype}")
    y = y.detach().to("cpu", torch.int64, copy=True)
    if not (int(y.min()) >= 0 and int(y.max()) <= codec.base):
        raise CanvasError("y", f"digits must be in 0..{codec.base - 1}, or {codec.base} where free")
    free = y == codec.mask_index
    # The codes of tokens are 0..V-1 in any order, so digits agree with some token exactly when they do with
    # zeros in the free places.
    smallest_code = (y.masked_fill(free, 0) * codec.place_values).sum(-1)
    if int(smallest_code.max()) >= codec.vocab_size:
        position = int(smallest_code.ge(codec.vocab_size).int().argmax())
        raise CanvasError(
            "y", f"the digits at position {position} agree with none of {codec.vocab_size} tokens"
        )
    runs, counts = torch.unique_consecutive(free.any(-1), return_counts=True)
    stops = counts.cumsum(0)
    triples = zip((stops - counts).tolist(), stops.tolist(), runs.tolist(), strict=True)
    segments = tuple(Segment(start, stop, gap) for start, stop, gap in triples)
    return Canvas(y, codec.mask_index, segments, open_ended=False)


def check_stop(canvas: Canvas, stop: Sequence[str], tokenizer: Tokenizer | None) -> None:
    """Check the stop strings of a request.

    Raises:
        CanvasError: if there are stop strings, and the canvas is not open-ended, there is no tokenizer, or
            one of them is empty or not text.
    """
    if not isinstance(stop, Sequence) or isinstance(stop, (str, bytes)):
        raise CanvasError("stop", "stop must be a list of strings")
    if not stop:
        return
    if not canvas.open_ended:
        raise CanvasError("stop", "stop needs an open end: leave out suffix, template and known digits")
    if tokenizer is None:
        raise CanvasError("stop", "stop needs a tokenizer, and this model has none")
    if not all(isinstance(item, str) and item for item in stop):
        raise CanvasError("stop", "stop must be a list of strings that are not empty")
    if any(not _is_unicode(item) for item in stop):
        raise CanvasError("stop", "a stop string holds half of a surrogate pair")


def _prompt_parts(
    tokenizer: Tokenizer | None,
    codec: SubtokenCodec,
    context: int,
    prompt: Tokens | None,
    suffix: Tokens | None,
    max_tokens: int | None,
) -> list[_Part]:
    before = fixed_tokens(tokenizer, codec, "prompt", prompt if prompt is not None else ())
    after = fixed_tokens(tokenizer, codec, "suffix", suffix if suffix is not None else ())
    num_fixed = len(before[0]) + len(after[0])
    for param, part, limit in (
        ("prompt", before, context - 1),
        ("suffix", after, context - 1 - len(before[0])),
    ):
        if len(part[0]) > limit:
            raise CanvasError(
                param,
                f"{param} has {len(part[0])} tokens, but at most {max(limit, 0)} fit: the context holds {context}, "
                f"and one must be left to sample; shorten {param}",
            )
    if max_tokens is None:
        max_tokens = context - num_fixed
    elif not is_integer(max_tokens) or max_tokens < 1:
        raise CanvasError("max_tokens", f"max_tokens must be an integer of at least 1, got {max_tokens!r}")
    elif max_tokens > context - num_fixed:
        raise CanvasError(
            "max_tokens",
            f"max_tokens must be at most {context - num_fixed}: the context holds {context} tokens, and "
            f"{num_fixed} {'is' if num_fixed == 1 else 'are'} given",
        )
    return [before, max_tokens, after] if after[0] else [before, max_tokens]


def _template_parts(
    tokenizer: Tokenizer | None, codec: SubtokenCodec, context: int, template: Template
) -> list[_Part]:
    parts: list[_Part] = []
    for part in template:
        item = part["gap"] if isinstance(part, Mapping) and part.keys() == {"gap"} else part
        if isinstance(item, str):
            parts.append(fixed_tokens(tokenizer, codec, "template", item))
        elif isinstance(item, bool) or not isinstance(item, (int, np.integer)) or item < 1:
            raise CanvasError(
                "template",
                'a gap of the template must be {"gap": number of tokens}, an integer of at least 1 token',
            )
        else:
            parts.append(int(item))
    if not any(isinstance(part, int) for part in parts):
        raise CanvasError("template", "the template has no gap, so there is nothing to sample")
    total = _num_tokens(parts)
    if total > context:
        raise CanvasError(
            "template", f"the request needs {total} tokens, but the context holds {context}; shorten template"
        )
    return parts


def _num_tokens(parts: Sequence[_Part]) -> int:
    return sum(part if isinstance(part, int) else len(part[0]) for part in parts)


def fixed_tokens(
    tokenizer: Tokenizer | None, codec: SubtokenCodec, param: str, content: Tokens
) -> tuple[Sequence[int], str | None]:
    """Return the tokens of a text or of token ids, and the text if it was one.

    Args:
        tokenizer: of the model; None if it has none.
        codec: its codec.
        param: what the content is called in messages.
        content: what was given.

    Raises:
        CanvasError: it is no text and no list of the model's token ids, or text without a tokenizer.
    """
    if isinstance(content, str):
        if not _is_unicode(content):
            raise CanvasError(param, f"{param} holds half of a surrogate pair, which is not text")
        if tokenizer is None:
            if content:
                raise CanvasError(param, f"{param} is text, but this model has no tokenizer")
            return (), ""
        return tokenizer.encode(content), content
    if isinstance(content, (Tensor, np.ndarray)) and content.ndim == 1:
        content = content.tolist()
    if isinstance(content, bytes) or not isinstance(content, Sequence):
        shape = getattr(content, "shape", None)
        got = type(content).__name__ + (f" of shape {tuple(shape)}" if shape else "")
        raise CanvasError(param, f"{param} must be text or a list of token ids, got {got}")
    limit = codec.vocab_size if tokenizer is None else min(codec.vocab_size, tokenizer.vocab_size)
    if any(
        isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < limit
        for token in content
    ):
        raise CanvasError(param, f"{param} must hold token ids in 0..{limit - 1}")
    return [int(token) for token in content], None


def as_tensor(given: Any) -> Any:
    """Return an array of numbers as a tensor, of integers as int64, and anything else as it is."""
    if not isinstance(given, np.ndarray) or given.dtype.kind not in "biuf":
        return given
    return torch.from_numpy(given.astype(np.int64 if given.dtype.kind in "iu" else given.dtype))


def _is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(char) <= 0xDFFF for char in text)
