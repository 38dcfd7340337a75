"""What a client would rather have: a picture or JSON, by its Accept header (RFC 9110, section 12.5.1)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

_WEIGHT = re.compile(r"\s*q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*", re.IGNORECASE)


def preferred(accept: str | None) -> Literal["image", "json"] | None:
    """Return which of image/png and application/json an Accept header ranks higher; None if neither.

    Args:
        accept: the header's value, None if there is none. Ranges whose weight is none (q=2, q=abc) count for nothing.
    """
    weights = _weights("*/*" if accept is None else accept)
    image = _weight(weights, "image/png", "image/*")
    json = _weight(weights, "application/json", "application/*")
    if image == json:
        return None
    return "image" if image > json else "json"


def _weights(accept: str) -> dict[str, float]:
    """Return the weight of each well-formed media range; of one that is there twice, the first."""
    weights: dict[str, float] = {}
    for part in _split(accept, ","):
        media_range, *parameters = _split(part, ";")
        given = next((part for part in parameters if part.partition("=")[0].strip().lower() == "q"), "q=1")
        weight = _WEIGHT.fullmatch(given)
        if weight is not None:
            weights.setdefault(media_range.strip().lower(), float(weight[1]))
    return weights


def _split(text: str, separator: str) -> Iterator[str]:
    """Yield the parts between separators that stand in no quoted string; an open one reaches to the end."""
    start, is_quoted, is_escaped = 0, False, False
    for place, character in enumerate(text):
        if is_escaped:
            is_escaped = False
        elif is_quoted and character == "\\":
            is_escaped = True
        elif character == '"':
            is_quoted = not is_quoted
        elif character == separator and not is_quoted:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _weight(weights: dict[str, float], *ranges: str) -> float:
    """Return the weight of the narrowest range that is there; 0 if there is none."""
    return next((weights[name] for name in (*ranges, "*/*") if name in weights), 0.0)
