"""When a request that found the queue full is worth another try: the queue is known, and so is how fast it moves."""

from __future__ import annotations

import math
from collections.abc import Collection

from server.engine.failures import QueueFullError
from server.engine.model_queue import ModelQueue

MAX_RETRY_AFTER_S = 3600


def queue_full(queues: Collection[ModelQueue], num_rows: int) -> QueueFullError:
    """Return the refusal of a request; see `seconds_until_free`."""
    seconds = min(seconds_until_free(queues, num_rows), _seconds_until_late(queues, num_rows))
    return QueueFullError(min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S))


def _seconds_until_late(queues: Collection[ModelQueue], num_rows: int) -> float:
    """Return when so many rows have gone at the latest: none outlives the deadline of its request."""
    gone = 0
    for seconds_left, num_own in sorted(each for queue in queues for each in queue.seconds_left()):
        gone += num_own
        if gone >= num_rows:
            return seconds_left
    return math.inf


def seconds_until_free(queues: Collection[ModelQueue], num_rows: int) -> float:
    """Return about how long it takes until so many rows, of any models, have come free.

    Args:
        queues: of all models.
        num_rows: that a request waits for.
    """
    held = [(queue, queue.num_rows) for queue in queues]
    busy = [(queue, num_own) for queue, num_own in held if num_own]
    of_all = sum(queue.seconds_until_free(num_own) for queue, num_own in busy)
    # Rows that are still to be submitted come on top.
    to_come = sum(queue.num_coming * queue.seconds_per_row for queue in queues if queue.num_coming)
    # As long as they all are busy, each model gets an equal share of the time, and of its calls those that are there
    # get only what those to come leave them.
    num_sharing = sum(1 for queue, num_own in held if num_own or queue.num_coming)
    of_one_model = [
        num_sharing * queue.seconds_until_free(num_rows) * (1 + queue.num_coming / num_own)
        for queue, num_own in busy
        if num_own >= num_rows
    ]
    return min([of_all + to_come, *of_one_model])
