"""Labels written as text: numbers are numbers, and no name is one."""

from __future__ import annotations

import pytest

from prime_core.labels import check_label_name, check_label_names, find_label, parse_label


@pytest.mark.parametrize(
    ("text", "label"),
    [("7", 7), ("0", 0), ("007", "007"), ("999999999", 999_999_999), ("9" * 5000, "9" * 5000), ("-1", "-1"),
     ("1e3", "1e3"), ("", ""), ("cat", "cat"), ("class 7", "class 7"), ("٧", "٧"), (" 7", " 7")],
)  # fmt: skip
def test_a_label_is_a_number_or_a_name(text: str, label: int | str) -> None:
    assert parse_label(text) == label


@pytest.mark.parametrize("name", ["7", "007", "9" * 5000, "٧"])
def test_a_number_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"is a number, and labels have numbers already; name it 'class "):
        check_label_name(name)


@pytest.mark.parametrize("name", ["cat", "class 7", "7up", "-1", "nullable", "Straße", "家", "a b"])
def test_other_names_are_kept(name: str) -> None:
    assert check_label_name(name) == name
    assert parse_label(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("a\nb", "control or format characters"),
        ("a\x00", "control or format characters"),
        ("\x1b[31mred", "control or format characters"),
        ("cat\u202e", "control or format characters"),  # right-to-left override
        ("\u2066cat", "control or format characters"),
        ("c\u200bat", "control or format characters"),  # a space of no width
        ("a\u2028b", "control or format characters"),
        ("\ud800", "control or format characters"),
        ("null", "would mean no label"),
        ("NULL", "would mean no label"),
    ],
)
def test_a_name_that_misleads_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_label_name(name)
    assert str(caught.value).isprintable()


def test_two_labels_of_one_name_are_refused() -> None:
    check_label_names(["cat", "dog", "Cat"])
    with pytest.raises(ValueError, match="labels 0 and 2 have one name, 'cat'; give every label its own"):
        check_label_names(["cat", "dog", "cat"])


@pytest.mark.parametrize(
    ("text", "number"),
    [("Bag", 0), ("bag", 0), ("BAG", 0), ("Cat", 1), ("cat", 2), ("CAT", None), ("b", None)],
)
def test_names_are_found_in_any_case_that_leaves_no_doubt(text: str, number: int | None) -> None:
    assert find_label(("Bag", "Cat", "cat"), text) == number
