"""Labels written as text: numbers are numbers, and no name is one."""

from __future__ import annotations

import pytest

from prime_core.labels import check_label_name, parse_label


@pytest.mark.parametrize(
    ("text", "label"),
    [("7", 7), ("007", 7), ("999999999", 999_999_999), ("9" * 5000, "9" * 5000), ("-1", "-1"), ("1e3", "1e3"),
     ("", ""), ("cat", "cat"), ("class 7", "class 7"), ("٧", "٧"), (" 7", " 7")],
)  # fmt: skip
def test_a_label_is_a_number_or_a_name(text: str, label: int | str) -> None:
    assert parse_label(text) == label


@pytest.mark.parametrize("name", ["7", "007", "9" * 5000, "٧"])
def test_a_number_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"is a number, and labels have numbers already; name it 'class "):
        check_label_name(name)


@pytest.mark.parametrize("name", ["cat", "class 7", "7up", "-1", ""])
def test_other_names_are_kept(name: str) -> None:
    assert check_label_name(name) == name
    assert parse_label(name) == name
