"""POST /generate between its route and the engine: from a checked request to rows, from finished rows to text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from fastapi import Request

from prime_core.canvas import CanvasError, text_canvas
from prime_core.checkpoint import Checkpoint
from prime_core.prepare import PreparedRows, Sample, finish_row, prepare_rows
from server.batcher import Job
from server.metrics import Metrics
from server.model_queue import ModelQueue
from server.request import Service, run_request, timings_of
from server.schemas.base import Limits
from server.schemas.text import Gap, GenerateRequest, GenerateResponse, Output, Usage


async def generate(
    service: Service, queue: ModelQueue, asked: GenerateRequest, request: Request
) -> GenerateResponse:
    """Answer a checked request.

    Args:
        service: the engine and the threads.
        queue: the model.
        asked: the body, checked against the schema of the model.
        request: the HTTP request; its body has been read.

    Raises:
        ApiError: see `run_request`.
        ClientDisconnect: if the client went away.
    """
    answer = await run_request(
        service,
        request,
        queue.name,
        asked.n,
        partial(prepare, queue.checkpoint, asked, service.limits[queue.name]),
        partial(text_answer, request.state.request_id, queue),
    )
    count(service.engine.metrics, answer)
    return answer


def prepare(checkpoint: Checkpoint, asked: GenerateRequest, limits: Limits) -> PreparedRows:
    """Return the rows of a request, with their reveal plans.

    Raises:
        CanvasError: if the request does not fit the model's context or the limit of work.
    """
    _check_chars(asked, limits)
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


def text_answer(request_id: str, queue: ModelQueue, prepared: PreparedRows, job: Job) -> GenerateResponse:
    """Return the answer to a request whose rows are finished.

    Raises:
        NonFiniteError: if a row failed.
    """
    finished = [finish_row(queue.checkpoint, prepared, row) for row in prepared.rows]
    samples = [sample for sample in finished if isinstance(sample, Sample)]
    assert len(samples) == len(finished), "a text model makes text"
    prompt_tokens = sum(
        segment.stop - segment.start for segment in prepared.canvas.segments if not segment.gap
    )
    completion_tokens = sum(len(sample.token_ids) - prompt_tokens for sample in samples)
    return GenerateResponse(
        id=request_id,
        model=queue.name,
        outputs=[_output(sample) for sample in samples],
        usage=Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            denoiser_calls=sum(sample.nfe for sample in samples),
        ),
        timings=timings_of(job),
    )


def _output(sample: Sample) -> Output:
    return Output(
        text=sample.text,
        gaps=sample.gaps,
        token_ids=sample.token_ids,
        finish_reason="stop" if sample.finish_reason == "stop" else "length",
        seed=sample.seed,
        nfe=sample.nfe,
        steps=sample.steps,
        steps_skipped=sample.steps_skipped,
    )


def count(metrics: Metrics, answer: GenerateResponse) -> None:
    """Count a request that was answered."""
    stopped = all(output.finish_reason == "stop" for output in answer.outputs)
    metrics.request_done(
        answer.model,
        "stop" if stopped else "length",
        answer.timings.total_s,
        answer.timings.queue_s,
        [(output.nfe, output.steps_skipped) for output in answer.outputs],
    )
    metrics.prompt_tokens.labels(answer.model).inc(answer.usage.prompt_tokens)
    metrics.tokens.labels(answer.model).inc(answer.usage.completion_tokens)
