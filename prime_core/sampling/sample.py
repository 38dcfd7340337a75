"""The offline loop: from a request to samples, rows at different steps in one denoiser call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from prime_core.checkpoint import Checkpoint
from prime_core.sampling.lookahead import Lookahead
from prime_core.sampling.prepare import finish_row, prepare_rows
from prime_core.sampling.request import Request
from prime_core.sampling.stepper import AnyRow, Stepper


def run_rows(
    stepper: Stepper,
    rows: Sequence[AnyRow],
    max_rows: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Advance rows until all are done.

    Rows never run in lockstep: each jumps to its own next event, and a finished row makes room for a waiting
    one.

    Args:
        stepper: the network.
        rows: any rows.
        max_rows: most rows in one denoiser call, at least 1.
        progress: called after every denoiser call with (events done, events in all), summed over the rows; on a GPU
            those of the calls that are queued count as done.

    Raises:
        ValueError: if ``max_rows`` is out of range.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    waiting = deque(row for row in rows if not row.done)
    total = sum(row.remaining for row in waiting)
    running: list[AnyRow] = []
    calls = Lookahead(stepper)
    while waiting or running:
        while waiting and len(running) < max_rows:
            running.append(waiting.popleft())
        calls.step(running)
        running = [row for row in running if not row.done]
        if progress is not None:
            progress(total - sum(row.remaining for row in (*running, *waiting)), total)
    calls.finish()


def sample(
    checkpoint: Checkpoint,
    request: Request | None = None,
    *,
    max_rows: int = 64,
    progress: Callable[[int, int], None] | None = None,
    **fields: Any,
) -> list[Any]:
    """Sample from a model; the same arguments give the same samples as the server gives.

    The law is that of ancestral sampling on a grid of ``steps`` steps, but only steps that reveal something call
    the network.

        sample(checkpoint, prompt="In the beginning", n=4, steps=64, seed=1)
        sample(checkpoint, label="Sneaker", n=16, steps=64, seed=1)

    Args:
        checkpoint: the model.
        request: what is asked for; None takes the fields.
        max_rows: most rows in one denoiser call.
        progress: called after every denoiser call with (events done, events in all).
        **fields: the fields of a `TextRequest`, or for image models of an `ImageRequest` and ``preset``, the name of
            published settings.

    Returns:
        ``n`` `Sample` of a text model or ``n`` `ImageSample` of an image model, in the order of their row seeds.

    Raises:
        CanvasError: if a field does not fit the model; ``param`` names it.
        ValueError: if a value is out of range.
        NonFiniteError: if the network gave no finite logits for a row.
    """
    prepared = prepare_rows(checkpoint, request, **fields)
    run_rows(Stepper(checkpoint.denoiser, checkpoint.codec), prepared.rows, max_rows, progress)
    return [finish_row(checkpoint, prepared, row) for row in prepared.rows]
