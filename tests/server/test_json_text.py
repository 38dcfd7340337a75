"""What JSON texts of requests become: numbers out of range are NaN, whichever way they are found."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

import server.http.json_text as json_text
from server.http.errors import ApiError
from server.http.json_text import parse_json

ODD = [
    "-0", "-0.0", "-0e0", "1e999", "-1e999", "1E400", "1e-999", "-1e-999", "18446744073709551616", "NaN", "Infinity",
    "-Infinity", "-18446744073709551616", "1" + "0" * 5000, "-" + "9" * 4301, "1" * 400 + ".0", "0." + "0" * 1000 + "1",
]  # fmt: skip
PLAIN = [
    "0", "1", "18446744073709551615", "9999999999999999999", "-1", "-18446744073709551615", "0.5", "-0.5", "1e3",
    "0.1234567890123456789", "123456789012345678.25", "0.0", "0e0", "7e22", "1E-3", "true", "null", '"-0"', '"1e999"',
]  # fmt: skip


def always_looked_at(text: str, monkeypatch: pytest.MonkeyPatch) -> object:
    with monkeypatch.context() as patched:
        patched.setattr(json_text, "_may_hold_odd_numbers", lambda body: True)
        return parse_json(text.encode())


@pytest.mark.parametrize("number", ODD)
def test_numbers_that_no_field_takes_are_nan(number: str) -> None:
    value: Any = parse_json(f'{{"a": [{number}]}}'.encode())
    if number in ("1e-999", "0." + "0" * 1000 + "1"):  # too small to tell from 0, or too long
        assert value["a"][0] == 0 or math.isnan(value["a"][0])
    else:
        assert math.isnan(value["a"][0])


@pytest.mark.parametrize("number", PLAIN)
def test_other_values_are_what_json_says(number: str) -> None:
    value = parse_json(number.encode())
    assert value == json.loads(number)
    assert type(value) is type(json.loads(number))


def test_texts_whose_numbers_are_not_looked_at_have_none_that_must_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = random.Random(0)
    quick = 0
    for _ in range(3000):
        texts = [drawn.choice(4 * PLAIN + ODD) for _ in range(drawn.choice([1, 1, 2, 5]))]
        texts += ["".join(drawn.choice("0123456789.eE+-") for _ in range(drawn.randint(1, 24)))]
        text = f'{{"a": [{drawn.choice([", ", ","]).join(texts[: drawn.randint(1, 9)])}]}}'
        try:
            careful = always_looked_at(text, monkeypatch)
        except ApiError as error:
            with pytest.raises(ApiError, match=error.message):
                parse_json(text.encode())
            continue
        assert repr(parse_json(text.encode())) == repr(careful)
        quick += not json_text._may_hold_odd_numbers(text.encode())
    assert quick > 100


def test_the_place_of_what_is_wrong_is_told() -> None:
    with pytest.raises(ApiError, match=r"bad byte at offset 9$"):
        parse_json(b'{"a":\n "b\xff"}')
    with pytest.raises(ApiError, match=r"see character 7$"):
        parse_json(b'{"a":\n x}')


def test_plain_numbers_are_parsed_without_a_call_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "_integer", lambda text: pytest.fail("it was looked at"))
    assert parse_json(b'{"prompt": [1, 22, 50256], "e": "1.5 E 7", "n": 9999999999999999999}') == {
        "prompt": [1, 22, 50256],
        "e": "1.5 E 7",
        "n": 9999999999999999999,
    }


def test_integers_of_more_than_64_bits_are_no_numbers() -> None:
    assert parse_json(b"[18446744073709551615, -18446744073709551615]") == [2**64 - 1, 1 - 2**64]
    for text in [
        b"18446744073709551616",
        b"-18446744073709551616",
        b"99999999999999999999",
        b"1" + b"0" * 30,
    ]:
        value = parse_json(text)
        assert isinstance(value, float)
        assert math.isnan(value)
