"""Headers that say what an answer in another's shape has no field for: its seed and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prime_core.sampling.row import Row

SAMPLING_HEADERS: dict[str, dict[str, Any]] = {
    "X-Seed": {"schema": {"type": "string"}, "description": "this seed gives the same outputs again"},
    "X-NFE": {"schema": {"type": "string"}, "description": "sum of the denoiser calls of the outputs"},
}


def sampling_headers(rows: Sequence[Row]) -> dict[str, str]:
    """Return the headers of a request with these rows; both are known before the first denoiser call."""
    return {"X-Seed": str(rows[0].seed), "X-NFE": str(sum(row.plan.nfe for row in rows))}
