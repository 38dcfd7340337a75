"""Parses the JSON text of a request: strict about duplicate keys, and about numbers that no field can take.

A number that no field can take (NaN, an infinity, an overflow, minus zero, an integer of 2^64 or more in magnitude)
comes back as NaN, so that the schema refuses it by the name of its field.
"""

from __future__ import annotations

import json
import math
from typing import Any, Never

from server.http.errors import ApiError

_LONGEST_NUMBER = 1000
_INTEGER_BOUND = 2**64
# What comes back as NaN, for messages.
ODD_NUMBERS = (
    f"NaN, infinities, minus zero, integers of 2^64 and more, and more than {_LONGEST_NUMBER} digits"
)
_LONGEST_INTEGER = len(str(_INTEGER_BOUND)) + 1  # with its sign
# Every digit as 0, and E as e: what makes a number suspicious can then be searched for as it is.
_SHAPE = bytes.maketrans(b"123456789E", b"000000000e")
_SUSPICIOUS = (b"0" * len(str(_INTEGER_BOUND)), b"0e", b"-0")


def parse_json(body: bytes | bytearray) -> object:
    """Return the value of a JSON text.

    Raises:
        ApiError: 400 for what is not JSON in UTF-8 or is nested too deeply, 422 for a duplicate key.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(
            400, "invalid_utf8", f"the body is not UTF-8: bad byte at offset {error.start}"
        ) from None
    # To look at each number takes four times as long as to parse it; most texts have none that must be looked at.
    look = _may_hold_odd_numbers(body)
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=lambda _: math.nan,
            parse_int=_integer if look else None,
            parse_float=_number if look else None,
        )
    except json.JSONDecodeError as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: see character {error.pos}") from None
    except RecursionError:
        raise ApiError(400, "invalid_json", "the JSON of the body is nested too deeply") from None


def _may_hold_odd_numbers(body: bytes | bytearray) -> bool:
    """Whether a number may be out of range: it has 20 digits in a row or an exponent, or is negative."""
    shape = body.translate(_SHAPE)
    return any(mark in shape for mark in _SUSPICIOUS)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        _refuse_duplicates()
    return result


def _refuse_duplicates() -> Never:
    raise ApiError(422, "duplicate_key", "a key of the body appears twice in one object; send each key once")


def _integer(text: str) -> int | float:
    if len(text) > _LONGEST_INTEGER or text == "-0":  # before int(), whose cost is quadratic in the length
        return math.nan
    value = int(text)
    return value if abs(value) < _INTEGER_BOUND else math.nan


def _number(text: str) -> float:
    value = float(text) if len(text) <= _LONGEST_NUMBER else math.nan
    minus_zero = value == 0 and text.startswith("-")
    return math.nan if math.isinf(value) or minus_zero else value
