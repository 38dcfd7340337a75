"""Labels of images as people write them: a number, or a name that is no number."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Longer numerals are no label's number: a model has at most 2^16.
_NUMERAL = re.compile(r"0|[1-9][0-9]{0,8}")
# What an address or a JSON body writes for "no label".
_NO_LABEL = "null"


def parse_label(text: str) -> int | str:
    """Return a label that was written as text, on a command line or in an address: its number or its name."""
    return int(text) if _NUMERAL.fullmatch(text) else text


def find_label(names: Sequence[str], text: str) -> int | None:
    """Return the number of the label with a name, whatever its case if no other name differs in case alone.

    Args:
        names: of all labels.
        text: a name as somebody wrote it.
    """
    if text in names:
        return names.index(text)
    alike = [number for number, name in enumerate(names) if name.casefold() == text.casefold()]
    return alike[0] if len(alike) == 1 else None


def check_label_name(name: str) -> str:
    """Return the name of a label.

    Raises:
        ValueError: it is empty or "null", holds control or format characters or nothing but space, or consists of
            digits alone, so that "7" would be both a name and the number of another label.
    """
    if not name.strip():
        raise ValueError("a label name is empty; give every label a name, or none")
    # Format characters, marks of writing direction among them, make two names look alike; so do separators.
    if not name.isprintable():
        raise ValueError(
            "a label name holds control or format characters (such as line ends or marks of writing direction); "
            "leave them out"
        )
    if name.lower() == _NO_LABEL:
        raise ValueError(f"label name {name!r} would mean no label; name it 'class {name}', say")
    if name.isdecimal():
        raise ValueError(
            f"label name {name[:20]!r} is a number, and labels have numbers already; name it 'class {name[:20]}', say"
        )
    return name


def check_label_names(names: Sequence[str]) -> None:
    """Check that each name is that of one label.

    Raises:
        ValueError: two labels have one name.
    """
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        if name in first:
            raise ValueError(
                f"labels {first[name]} and {number} have one name, {name[:40]!r}; give every label its own"
            )
        first[name] = number
