"""POST /generate between its route and the engine: from a checked request to rows, from finished rows to text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from fastapi import Request

from prime_core.checkpoint import Checkpoint
from prime_core.sampling.canvas import Canvas, CanvasError
from prime_core.sampling.prepare import PreparedRows, Sample, finish_text, prepare_rows, text_canvas_of
from prime_core.sampling.request import TextRequest
from server.engine.batcher import Job
from server.engine.model_queue import ModelQueue
from server.metrics import Metrics
from server.request import Recipe, Service, timings_of
from server.schemas.base import Limits
from server.schemas.text import Gap, GenerateRequest, GenerateResponse, Output, Usage
from server.text.text_length import check_chars


def text_recipe(
    service: Service, queue: ModelQueue, body: GenerateRequest, request: Request
) -> Recipe[PreparedRows, GenerateResponse]:
    """Return how a checked request is answered.

    Args:
        service: the limits.
        queue: the model.
        body: of the request, checked against the schema of the model.
        request: the HTTP request.
    """
    return Recipe(
        body.n,
        partial(prepare_text, queue.checkpoint, body, service.limits[queue.name]),
        partial(text_response, request.state.request_id, queue),
        count_text,
    )


def prepare_text(checkpoint: Checkpoint, body: GenerateRequest, limits: Limits) -> PreparedRows:
    """Return the rows of a request, with their reveal plans.

    Raises:
        CanvasError: if the request does not fit the model's context or the limit of work.
    """
    template = None
    if body.template is not None:
        template = [part.gap if isinstance(part, Gap) else part for part in body.template]
    request = TextRequest(
        n=body.n,
        steps=body.steps,
        seed=body.seed,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        prompt=body.prompt,
        suffix=body.suffix,
        template=template,
        max_tokens=body.max_tokens,
        stop=body.stops,
    )
    (prepared,) = prepare_together(checkpoint, [request], limits)
    return prepared


def prepare_together(
    checkpoint: Checkpoint, requests: Sequence[TextRequest], limits: Limits
) -> list[PreparedRows]:
    """Return the rows of requests that differ in their prompts and seeds, under one limit of work for all.

    Raises:
        CanvasError: as for `prepare_text`; with more than one request it says which prompt it is about.
    """
    for number, request in enumerate(requests, 1):
        with _of_prompt(number, len(requests)):
            _check_chars(request, limits)
    canvases = []
    for number, request in enumerate(requests, 1):
        with _of_prompt(number, len(requests)):
            canvases.append(text_canvas_of(checkpoint, request))
    _check_work(requests, canvases, limits)
    prepared = []
    for number, (request, canvas) in enumerate(zip(requests, canvases, strict=True), 1):
        with _of_prompt(number, len(requests)):
            prepared.append(prepare_rows(checkpoint, request, canvas=canvas))
    return prepared


@contextmanager
def _of_prompt(number: int, num_prompts: int) -> Iterator[None]:
    """Say in an error which of several prompts it is about."""
    try:
        yield
    except CanvasError as error:
        if num_prompts == 1:
            raise
        raise CanvasError(error.param, f"prompt number {number}: {error}") from None


def _check_chars(request: TextRequest, limits: Limits) -> None:
    """Refuse fixed text that cannot fit."""
    texts: dict[str, Sequence[object]] = {
        "prompt": [request.prompt],
        "suffix": [request.suffix],
        "template": request.template or [],
    }
    for param, parts in texts.items():
        num_chars = sum(len(part) for part in parts if isinstance(part, str))
        check_chars(num_chars, limits, param, remedy=f"shorten {param}")


def _check_work(requests: Sequence[TextRequest], canvases: Sequence[Canvas], limits: Limits) -> None:
    """Refuse requests whose n * tokens * denoiser calls together is over the limit, before their plans are drawn."""
    sizes = [(canvas.length, int(canvas.free.sum())) for canvas in canvases]
    work = sum(
        request.n * num_tokens * (num_free if request.steps == "exact" else min(request.steps, num_free))
        for request, (num_tokens, num_free) in zip(requests, sizes, strict=True)
    )
    if work > limits.max_work:
        counted = f"steps counted up to the free digits, summed over the {len(requests)} prompts"
        if len(requests) == 1:
            num_tokens, num_free = sizes[0]
            counted = f"{num_tokens} tokens and steps counted up to the {num_free} free digits"
        raise CanvasError(
            "steps",
            f"n * tokens * steps is at most {limits.max_work}, with {counted}; "
            "lower n, the number of tokens or steps",
        )


def text_response(request_id: str, queue: ModelQueue, prepared: PreparedRows, job: Job) -> GenerateResponse:
    """Return the answer to a request whose rows are finished.

    Raises:
        NonFiniteError: if a row failed.
    """
    samples = [finish_text(queue.checkpoint, prepared, row) for row in prepared.rows]
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
        finish_reason=sample.finish_reason,
        seed=sample.seed,
        nfe=sample.nfe,
        steps=sample.steps,
        steps_skipped=sample.steps_skipped,
    )


def count_text(metrics: Metrics, answer: GenerateResponse) -> None:
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
