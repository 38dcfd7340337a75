"""The life of one request between its route and the engine: room, rows, the wait, the answer.

reserve room -> prepare rows (thread) -> submit to the engine -> await -> finish rows (thread) -> answer
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import Executor

from fastapi import Request
from starlette.requests import ClientDisconnect

from prime_core.canvas import CanvasError, text_canvas
from prime_core.checkpoint import Checkpoint
from prime_core.sample import NonFiniteError, PreparedRows, Sample, finish_row, prepare_rows
from server.batcher import Job
from server.engine import Engine
from server.errors import ApiError
from server.failures import EngineError, QueueFullError, UnavailableError
from server.schemas import Gap, GenerateRequest, GenerateResponse, Limits, Output, Timings, Usage


async def generate(
    engine: Engine, asked: GenerateRequest, limits: Limits, pool: Executor, request: Request
) -> GenerateResponse:
    """Answer a checked request.

    Args:
        engine: runs the rows.
        asked: the body, checked against the schema.
        limits: largest values of a request.
        pool: threads for tokenization and plans, so that the event loop never waits for them.
        request: the HTTP request, to see its client go; its body has been read.

    Raises:
        ApiError: 422 if it does not fit the model, 429 or 503 if it cannot be taken, 500 if it fails.
        ClientDisconnect: if the client went away; its rows are free within a step.
    """
    arrived_s = time.monotonic()
    loop = asyncio.get_running_loop()
    _reserve(engine, asked.n)
    submitted = False
    try:
        _check_chars(asked, limits)
        checkpoint = engine.model.checkpoint
        prepared = await loop.run_in_executor(pool, prepare, checkpoint, asked, limits)
        job = Job(list(prepared.rows), arrived_s)
        engine.submit(job)
        submitted = True
        await _wait(job, request)
        samples = await loop.run_in_executor(pool, finish, checkpoint, prepared)
    except CanvasError as error:
        raise ApiError(422, "invalid_value", str(error), param=error.param) from None
    except (NonFiniteError, EngineError, UnavailableError) as error:
        raise _failure(engine, error) from None
    except (ClientDisconnect, asyncio.CancelledError):
        engine.metrics.fail("cancelled")
        raise
    finally:
        if not submitted:
            engine.release(asked.n)
    answer = _answer(request.state.request_id, engine.model.name, prepared, samples, job)
    _count(engine, answer)
    return answer


def prepare(checkpoint: Checkpoint, asked: GenerateRequest, limits: Limits) -> PreparedRows:
    """Return the rows of a request, with their reveal plans.

    Raises:
        CanvasError: if the request does not fit the model's context or the limit of work.
    """
    template = None
    if asked.template is not None:
        template = [part.gap if isinstance(part, Gap) else part for part in asked.template]
    _check_work(checkpoint, asked, template, limits)
    return prepare_rows(
        checkpoint,
        n=asked.n,
        steps=asked.steps,
        seed=asked.seed,
        prompt=asked.prompt,
        suffix=asked.suffix,
        template=template,
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        stop=asked.stop,
    )


def finish(checkpoint: Checkpoint, prepared: PreparedRows) -> list[Sample]:
    """Return the samples of a request whose rows are all done."""
    return [finish_row(checkpoint, prepared, row) for row in prepared.rows]


def _check_chars(asked: GenerateRequest, limits: Limits) -> None:
    """Refuse fixed text that cannot fit however well it compresses: to tokenize it would delay others."""
    texts: dict[str, Sequence[object]] = {
        "prompt": [asked.prompt],
        "suffix": [asked.suffix],
        "template": [] if asked.template is None else asked.template,
    }
    for param, parts in texts.items():
        num_chars = sum(len(part) for part in parts if isinstance(part, str))
        if limits.max_chars is not None and num_chars > limits.max_chars:
            raise CanvasError(
                param,
                f"{param} has {num_chars} characters, but the context of {limits.context} tokens holds at "
                f"most {limits.max_chars}; shorten {param}",
            )


def _check_work(
    checkpoint: Checkpoint, asked: GenerateRequest, template: Sequence[str | int] | None, limits: Limits
) -> None:
    """Refuse a request whose n * tokens * denoiser calls is over the limit, before its plans are drawn."""
    digits = checkpoint.codec.target_length
    most_calls = math.inf if asked.steps == "exact" else asked.steps
    if asked.n * limits.context * min(most_calls, limits.context * digits) <= limits.max_work:
        return  # whatever its length
    canvas = text_canvas(
        checkpoint.tokenizer,
        checkpoint.codec,
        limits.context,
        prompt=asked.prompt,
        suffix=asked.suffix,
        template=template,
        max_tokens=asked.max_tokens,
    )
    num_tokens, num_free = len(canvas.y), int(canvas.free.sum())
    if asked.n * num_tokens * min(most_calls, num_free) > limits.max_work:
        raise CanvasError(
            "steps",
            f"n * tokens * steps is at most {limits.max_work}, with {num_tokens} tokens and steps counted "
            f"up to the {num_free} free sub-tokens; lower n, the number of tokens or steps",
        )


def _reserve(engine: Engine, num_rows: int) -> None:
    try:
        engine.reserve(num_rows)
    except QueueFullError as error:
        engine.metrics.reject("queue_full")
        raise ApiError(
            429,
            "queue_full",
            f"the queue holds at most {engine.max_queue_rows} rows; try again in {error.retry_after_s} s",
            headers={"Retry-After": str(error.retry_after_s)},
        ) from None
    except UnavailableError:
        draining = engine.state == "draining"
        engine.metrics.reject("draining" if draining else "unavailable")
        message = "the server is shutting down" if draining else "the engine has stopped"
        code = "draining" if draining else "unavailable"
        raise ApiError(503, code, f"{message}; send the request to another instance") from None


async def _wait(job: Job, request: Request) -> None:
    """Wait until the engine has finished the job or the client has gone, whichever is first."""
    done = asyncio.wrap_future(job.done)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientDisconnect
        done.result()
    finally:
        gone.cancel()
        done.cancel()  # a job that is not finished frees its rows; a finished one takes no notice


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure(engine: Engine, error: Exception) -> ApiError:
    """Count the failure of an accepted request and return its answer."""
    if isinstance(error, NonFiniteError):
        engine.metrics.fail("non_finite")
        return ApiError(500, "non_finite", "the model gave no finite probabilities for this request")
    if isinstance(error, EngineError):
        engine.metrics.fail("engine_error")
        return ApiError(
            500, "engine_error", "the denoiser failed in a call that this request was part of; try again"
        )
    engine.metrics.fail("unavailable")
    return ApiError(503, "unavailable", "the engine has stopped; send the request to another instance")


def _answer(
    request_id: str, model: str, prepared: PreparedRows, samples: Sequence[Sample], job: Job
) -> GenerateResponse:
    prompt_tokens = sum(
        segment.stop - segment.start for segment in prepared.canvas.segments if not segment.gap
    )
    completion_tokens = sum(len(sample.token_ids) - prompt_tokens for sample in samples)
    now_s = time.monotonic()
    started_s = job.submitted_s if job.started_s is None else job.started_s
    finished_s = started_s if job.finished_s is None else job.finished_s
    return GenerateResponse(
        id=request_id,
        model=model,
        outputs=[
            Output(
                text=sample.text,
                gaps=sample.gaps,
                token_ids=sample.token_ids,
                finish_reason="stop" if sample.finish_reason == "stop" else "length",
                seed=sample.seed,
                nfe=sample.nfe,
                steps=sample.steps,
                steps_skipped=sample.steps_skipped,
            )
            for sample in samples
        ],
        usage=Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            denoiser_calls=sum(sample.nfe for sample in samples),
        ),
        timings=Timings(
            queue_s=started_s - job.submitted_s,
            run_s=finished_s - started_s,
            total_s=now_s - job.submitted_s,
        ),
    )


def _count(engine: Engine, answer: GenerateResponse) -> None:
    metrics = engine.metrics
    stopped = all(output.finish_reason == "stop" for output in answer.outputs)
    metrics.success.labels("stop" if stopped else "length").inc()
    metrics.latency_s.observe(answer.timings.total_s)
    metrics.queue_s.observe(answer.timings.queue_s)
    metrics.prompt_tokens.inc(answer.usage.prompt_tokens)
    metrics.tokens.inc(answer.usage.completion_tokens)
    metrics.row_steps_skipped.inc(sum(output.steps_skipped for output in answer.outputs))
    for output in answer.outputs:
        metrics.nfe.observe(output.nfe)
