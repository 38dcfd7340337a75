"""The query of an address: numbers as in JSON, each field once, nothing unknown."""

from __future__ import annotations

import math
from urllib.parse import quote

import pytest

from server.http.errors import ApiError
from server.http.query import MAX_FIELDS, read_query

NAMES = ("n", "seed", "label", "model")


def read(query: str) -> dict[str, object]:
    return read_query(query.encode("latin-1"), NAMES, ("model",))


def test_values() -> None:
    assert read("") == {}
    assert read("n=3&seed=18446744073709551615&label=a%2Fb+c&model=7") == {
        "n": 3,
        "seed": 2**64 - 1,
        "label": "a/b c",
        "model": "7",
    }
    fields = read("n=0.5&seed=1e2&label=caf%C3%A9")
    assert fields == {"n": 0.5, "seed": 100.0, "label": "café"}
    assert isinstance(fields["seed"], float)  # as in a body: no integer


@pytest.mark.parametrize(
    "value", ["", "+3", "03", " 3", "3 ", "0x3", "1_0", "NaN", "true", "null", "٣", "[1]"]
)
def test_what_is_no_json_number_stays_text(value: str) -> None:
    assert read(f"n={quote(value)}") == {"n": value}


@pytest.mark.parametrize("value", ["-0", "-0.0", "1e999", "18446744073709551616", "1" + "0" * 5000])
def test_numbers_out_of_any_range_are_nan(value: str) -> None:
    (number,) = read(f"n={value}").values()
    assert isinstance(number, float) and math.isnan(number)


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("n", "invalid_query"),
        ("n=1&", "invalid_query"),
        ("&", "invalid_query"),
        ("n=1;seed=2&seed", "invalid_query"),
        ("label=%ff", "invalid_query"),
        ("label=\xff", "invalid_query"),
        ("&".join(["n=1"] * (MAX_FIELDS + 1)), "invalid_query"),
        ("n=1&n=1", "duplicate_key"),
        ("n=1&%6e=1", "duplicate_key"),
        ("canary=1", "unknown_key"),
        ("N=1", "unknown_key"),
        ("=1", "unknown_key"),
    ],
)
def test_bad_queries(query: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(query)
    assert (caught.value.status, caught.value.code) == (422, code)
    assert "canary" not in caught.value.message
