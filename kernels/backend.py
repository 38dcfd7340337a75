"""Which implementation of an op runs."""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "reference", "triton"]


def choose_backend(backend: Backend) -> Literal["reference"]:
    """Return the implementation that runs for a request; "auto" takes the best one that is available.

    Args:
        backend: "auto", "reference" (plain torch, any device) or "triton".

    Raises:
        ValueError: if the name is unknown, or the backend was asked for by name and is not available.
    """
    if backend == "triton":
        raise ValueError("backend 'triton' is not available: this version has no Triton kernels; use 'auto'")
    if backend not in ("auto", "reference"):
        raise ValueError("backend must be 'auto', 'reference' or 'triton'")
    return "reference"
