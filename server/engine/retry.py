"""When a request that found the queue full is worth another try: the queue is known, and so is how fast it moves."""

from __future__ import annotations

import math
from collections.abc import Collection

from server.engine.failures import QueueFullError
from server.engine.model_queue import ModelQueue

MAX_RETRY_AFTER_S = 3600


def queue_full(queues: Collection[ModelQueue], num_held: int, num_rows: int) -> QueueFullError:
    """Return the refusal of a request; see `seconds_until_free`."""
    seconds = seconds_until_free(queues, num_held, num_rows)
    return QueueFullError(min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S))


def seconds_until_free(queues: Collection[ModelQueue], num_held: int, num_rows: int) -> float:
    """Return about how long it takes until so many rows, of any models, have come free.

    Args:
        queues: of all models.
        num_held: rows that have room, also those of requests that are still to be submitted.
        num_rows: that a request waits for.
    """
    busy = [queue for queue in queues if queue.num_rows]
    of_all = sum(queue.seconds_until_free(queue.num_rows) for queue in busy)
    # Rows that are still to be submitted come on top; of which model, nobody knows.
    num_submitted = sum(queue.num_rows for queue in busy)
    num_coming = num_held - num_submitted
    per_row = sum(queue.seconds_per_row for queue in queues) / len(queues)
    # As long as they all are busy, each model gets an equal share of the time, and of its calls those that are there
    # get only what those to come leave them.
    of_one_model = [
        len(busy) * queue.seconds_until_free(num_rows) * num_held / num_submitted
        for queue in busy
        if queue.num_rows >= num_rows
    ]
    return min([of_all + num_coming * per_row, *of_one_model])
