"""Labels of images as people write them: a number, or a name that is no number."""

from __future__ import annotations

import re

# Longer numerals are no label's number: a model has at most 2^16.
_NUMERAL = re.compile(r"[0-9]{1,9}")


def parse_label(text: str) -> int | str:
    """Return a label that was written as text, on a command line or in an address: its number or its name."""
    return int(text) if _NUMERAL.fullmatch(text) else text


def check_label_name(name: str) -> str:
    """Return the name of a label.

    Raises:
        ValueError: it consists of digits alone, so that "7" would be both a name and the number of another label.
    """
    if name.isdecimal():
        raise ValueError(
            f"label name {name[:20]!r} is a number, and labels have numbers already; name it 'class {name[:20]}', say"
        )
    return name
