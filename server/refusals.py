"""The answers to requests that the engine does not take, or does not finish; each is counted."""

from __future__ import annotations

import math
from typing import Literal

from prime_core.sampling.prepare import NonFiniteError
from server.engine.batcher import Job
from server.engine.engine import Engine
from server.engine.failures import (
    DeadlineError,
    MemoryFullError,
    ModelFailedError,
    QueueFullError,
    UnavailableError,
)
from server.http.errors import ApiError
from server.metrics import Rejection


def reserve(engine: Engine, model: str, num_rows: int, longest_s: float) -> None:
    """Take room for the rows of a request, or count its refusal.

    Args:
        engine: the engine.
        model: what the request is for.
        num_rows: its rows.
        longest_s: no request takes more seconds.

    Raises:
        ApiError: 429 if the queue is full, 503 if no requests are taken.
    """
    try:
        engine.reserve(model, num_rows)
    except QueueFullError as error:
        raise _queue_full(engine, model, error, f"{engine.max_queue_rows} rows", longest_s) from None
    except UnavailableError as error:
        reason: Rejection = "draining" if engine.state == "draining" else _unavailable_reason(error)
        engine.metrics.reject(model, reason)
        # By then another instance has its place.
        headers = {"Retry-After": "1"} if reason == "draining" else None
        raise ApiError(503, reason, _UNAVAILABLE[reason], headers=headers) from None


def submit(engine: Engine, job: Job, longest_s: float) -> None:
    """Hand a job whose rows have reserved room over to the engine, or count its refusal.

    Args:
        engine: the engine.
        job: the rows.
        longest_s: as for `reserve`.

    Raises:
        ApiError: 422 if its plans alone take more memory than the queue may, 429 if they do with those of the others.
        UnavailableError: if the engine has stopped meanwhile.
    """
    num_bytes = sum(row.num_bytes for row in job.rows)
    if num_bytes > engine.max_queue_bytes:
        message = (
            f"the plans of this request take {num_bytes} bytes, and all of the queue at most "
            f"{engine.max_queue_bytes}; lower n, steps, num_samples or corrector.scale"
        )
        raise ApiError(422, "request_too_large", message)
    try:
        engine.submit(job)
    except QueueFullError as error:
        limit = f"{engine.max_queue_bytes} bytes of plans"
        raise _queue_full(engine, job.model, error, limit, longest_s) from None


def _queue_full(engine: Engine, model: str, error: QueueFullError, limit: str, longest_s: float) -> ApiError:
    engine.metrics.reject(model, "queue_full")
    # By then all that is in front has been answered, also what was not yet there for the forecast.
    seconds = min(error.retry_after_s, math.ceil(longest_s))
    return ApiError(
        429,
        "queue_full",
        f"the queue holds at most {limit}; try again in {seconds} s",
        headers={"Retry-After": str(seconds)},
    )


def check_deadline(engine: Engine, job: Job) -> None:
    """Refuse a job that cannot be done in time, however the queue moves.

    Only what is certain counts: the number of its calls, which the plans tell, and the time of the fastest call that
    the model ever made. Whoever waits in front may leave, so the queue is no reason.

    Raises:
        ApiError: 504.
    """
    least_s, left_s = engine.queues[job.model].least_seconds(job.rows), job.seconds_left
    if least_s > left_s:
        engine.metrics.reject(job.model, "deadline")
        calls = max(row.remaining for row in job.rows)
        raise ApiError(
            504,
            "deadline_unreachable",
            f"the {calls} denoiser calls of this request take at least {least_s:.3g} s, and it has {left_s:.3g} s; "
            "lower steps or allow more time",
        )


_UNAVAILABLE: dict[Rejection, str] = {
    "draining": "the server is shutting down; send the request to another instance",
    "unavailable": "the engine has stopped; send the request to another instance",
    "model_failed": "this model has failed and is out of service; send the request to another instance",
}


def _unavailable_reason(error: UnavailableError) -> Literal["unavailable", "model_failed"]:
    return "model_failed" if isinstance(error, ModelFailedError) else "unavailable"


def failure_of(engine: Engine, model: str, error: Exception, allowed_s: float) -> ApiError:
    """Count the failure of an accepted request and return its answer.

    Args:
        engine: its engine.
        model: what it was for.
        error: what ended it.
        allowed_s: how long it may take.
    """
    if isinstance(error, NonFiniteError):
        engine.metrics.fail(model, "non_finite")
        return ApiError(500, "non_finite", "the model gave no finite probabilities for this request")
    if isinstance(error, MemoryFullError):
        engine.metrics.fail(model, "out_of_memory")
        message = (
            "this request does not fit in the memory that is free; ask for fewer tokens, or try again later"
        )
        return ApiError(503, "out_of_memory", message)
    if isinstance(error, DeadlineError):
        engine.metrics.fail(model, "deadline")
        message = f"the request was not finished in its {allowed_s:g} s; lower n or steps, or allow more time"
        return ApiError(504, "deadline_exceeded", message)
    if isinstance(error, UnavailableError):
        reason = _unavailable_reason(error)
        engine.metrics.fail(model, reason)
        return ApiError(503, reason, _UNAVAILABLE[reason])
    engine.metrics.fail(model, "engine_error")
    return ApiError(
        500, "engine_error", "the denoiser failed in a call that this request was part of; try again"
    )
