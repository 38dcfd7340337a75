"""What the frames of text and images have in common."""

from __future__ import annotations

from typing import Any

from server.engine.feed import Changes, RowChange


def denoise_fields(changes: Changes, row: RowChange, mask_index: int) -> dict[str, Any]:
    """Return the fields of a `DenoiseFrame`.

    Args:
        changes: of the request.
        row: one of them.
        mask_index: b, of the model's codec.
    """
    digits = row.y[row.positions].tolist()
    return {
        "output": row.output,
        "step": row.step,
        "nfe": row.nfe,
        "progress": changes.progress,
        "eta_s": changes.eta_s,
        "positions": row.positions.tolist(),
        "digits": [[None if digit == mask_index else digit for digit in token] for token in digits],
    }
