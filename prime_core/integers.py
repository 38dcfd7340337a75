"""What counts as an integer: no bool, and no floating-point number, however whole."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an ``int``, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """Raise ValueError, naming the value, unless it is an integer of at least ``minimum``."""
    if not is_integer(value) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def holds_integers(tensor: Tensor) -> bool:
    """Return whether a tensor holds integers of any size, and no bools."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
