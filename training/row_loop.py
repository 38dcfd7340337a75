"""Samples many outputs, each at its own next step, without holding more plans than rows in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prime_core.checkpoint import Checkpoint
from prime_core.sampling.lookahead import Lookahead
from prime_core.sampling.prepare import ImageSample, PreparedRows, Sample, finish_row
from prime_core.sampling.row import Row
from prime_core.sampling.stepper import Stepper


def finished_rows(
    checkpoint: Checkpoint,
    prepare: Callable[[int], PreparedRows],
    indices: Iterable[int],
    max_rows: int,
    on_step: Callable[[Sequence[Row]], None],
) -> Iterator[tuple[int, Sample | ImageSample]]:
    """Sample outputs and yield each as soon as it is done.

    Reveal plans are drawn when a row's turn comes: a long request is never in memory as a whole.

    Args:
        checkpoint: the model.
        prepare: the request of one output, by its index.
        indices: outputs to make.
        max_rows: most rows in one denoiser call.
        on_step: called before every denoiser call with the rows that take part.

    Yields:
        index and output, in the order in which they finish.

    Raises:
        NonFiniteError: the network gave no finite logits for a row.
    """
    calls = Lookahead(Stepper(checkpoint.denoiser, checkpoint.codec))
    waiting = iter(indices)
    running: dict[Row, tuple[int, PreparedRows]] = {}
    while True:
        stepping = [row for row in running if not row.done]
        while len(stepping) < max_rows and (index := next(waiting, None)) is not None:
            prepared = prepare(index)
            running[prepared.rows[0]] = index, prepared
            stepping += [row for row in prepared.rows if not row.done]
        if not running:
            return
        if stepping:
            on_step(stepping)
            calls.step(stepping)
        else:
            calls.finish()
        for row in [row for row in running if row.done and row not in calls]:
            index, prepared = running.pop(row)
            yield index, finish_row(checkpoint, prepared, row)
