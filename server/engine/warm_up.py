"""The call of a model before it serves: what it allocates and compiles, the first request need not wait for.

It also tells whether the model works at all: when calls of requests fail, it is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prime_core.checkpoint import Checkpoint
from prime_core.prepare import NonFiniteError, prepare_rows
from prime_core.stepper import AnyRow, Stepper, StepResult

WARM_UP_TOKENS = 32


def try_checkpoint(name: str, checkpoint: Checkpoint) -> None:
    """Make one real call of a model that does not serve yet, in the calling thread.

    Args:
        name: of the model, for the message.
        checkpoint: what is to be tried.

    Raises:
        NonFiniteError: if the logits are not finite.
    """
    check_finite(name, Stepper(checkpoint.denoiser, checkpoint.codec).step(trial_rows(checkpoint)))


def trial_rows(checkpoint: Checkpoint) -> Sequence[AnyRow]:
    """Return the rows of such a request."""
    config = checkpoint.config.model
    fields: dict[str, Any] = (
        {} if config.kind == "unet" else {"max_tokens": min(WARM_UP_TOKENS, config.length)}
    )
    return prepare_rows(checkpoint, n=1, steps=1, seed=0, **fields).rows


def check_finite(name: str, results: Sequence[StepResult]) -> None:
    """Refuse weights that gave such results.

    Raises:
        NonFiniteError: if a row failed.
    """
    if not all(result.ok for result in results):
        raise NonFiniteError(
            f"model {name!r} gives logits that are not finite, so its weights are not sound: leave it out, or "
            "load another checkpoint of it"
        )
