"""Noise of evaluations: of blocks of rows whose size no setting changes, and a stream of its own for every estimate.

So figures of one seed do not depend on how many rows are in memory at a time, nor on what else is estimated.
"""

from __future__ import annotations

from kernels.noise import row_seed

NOISE_ROWS = 64
"""Rows whose masks are drawn together, and stratified."""


def noise_seeds(seed: int, num_streams: int) -> list[int]:
    """Return the seeds of the streams of one evaluation; the first is the evaluation's own."""
    return [row_seed(seed, stream) for stream in range(num_streams)]
