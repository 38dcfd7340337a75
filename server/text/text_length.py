"""The refusal of text that cannot fit a context however well it compresses: to tokenize it would delay others."""

from __future__ import annotations

from prime_core.sampling.canvas import CanvasError
from server.schemas.base import Limits


def check_chars(num_chars: int, limits: Limits, param: str, *, remedy: str, name: str | None = None) -> None:
    """Refuse text that is too long.

    Args:
        num_chars: characters of a text, or of all texts that share a context.
        limits: of the model.
        param: the field that holds it.
        remedy: what to do, in the message: "shorten prompt".
        name: of the text in the message; None for that of the field.

    Raises:
        CanvasError: naming the limit.
    """
    if limits.max_chars is not None and num_chars > limits.max_chars:
        raise CanvasError(
            param,
            f"{name or param} has {num_chars} characters, but the context of {limits.context} tokens holds at most "
            f"{limits.max_chars}; {remedy}",
        )
