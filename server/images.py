"""/images between its routes and the engine: from a checked request to rows, from finished rows to pictures."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from fastapi import Request

from prime_core.canvas import CanvasError
from prime_core.checkpoint import Checkpoint
from prime_core.config import UNetConfig
from prime_core.correctors import Corrector
from prime_core.curves import TemperatureCurve, TimeWarp
from prime_core.image_canvas import image_canvas
from prime_core.request import ImageRequest, preset_fields
from prime_core.sample import ImageSample, PreparedRows, finish_row, prepare_rows
from server.batcher import Job
from server.known import Known, KnownShape, parse_known
from server.model_queue import ModelQueue
from server.pictures import PNG_CHANNELS, to_grid, to_npy, to_png
from server.request import Service, run_request, timings_of
from server.schemas.base import Limits, Timings
from server.schemas.images import (
    Curve,
    ImageOutput,
    ImagesRequest,
    ImagesResponse,
    ImagesUsage,
    ResponseFormat,
)

_Curve = TypeVar("_Curve")


class ImagesAnswer(NamedTuple):
    """What goes out.

    Attributes:
        content: the body.
        media_type: of the body.
        headers: what a body without JSON cannot say.
        timings: where the time went.
        rows: denoiser calls and skipped steps of each image.
    """

    content: bytes
    media_type: str
    headers: dict[str, str]
    timings: Timings
    rows: list[tuple[int, int]]


async def make_images(
    service: Service,
    queue: ModelQueue,
    asked: ImagesRequest,
    response_format: ResponseFormat,
    request: Request,
) -> ImagesAnswer:
    """Answer a checked request.

    Args:
        service: the engine and the threads.
        queue: the model.
        asked: the body, checked against the schema of the model.
        response_format: of the answer.
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
        partial(prepare, queue.checkpoint, asked, response_format, service.limits[queue.name]),
        partial(_answer, request.state.request_id, queue, response_format),
    )
    metrics = service.engine.metrics
    metrics.request_done(queue.name, "complete", answer.timings.total_s, answer.timings.queue_s, answer.rows)
    metrics.images.labels(queue.name).inc(len(answer.rows))
    return answer


def prepare(
    checkpoint: Checkpoint, asked: ImagesRequest, response_format: ResponseFormat, limits: Limits
) -> PreparedRows:
    """Return the rows of a request, with their reveal plans.

    Raises:
        CanvasError: if the request does not fit the model or the limit of work.
    """
    config = checkpoint.config
    assert isinstance(config.model, UNetConfig), "this route is for image models"
    shape = KnownShape.of(config.model, config.codec)
    _check_format(shape, asked.n, response_format)
    request = image_request_of(asked, parse_known(asked.known, shape))
    _check_steps(request, limits)
    _check_work(checkpoint, config.model, request, limits)
    try:
        return prepare_rows(checkpoint, request)
    except CanvasError as error:  # digits come as `known` here, and are called y there
        raise CanvasError("known" if error.param == "y" else error.param, str(error)) from None


def image_request_of(asked: ImagesRequest, known: Known) -> ImageRequest:
    """Return the request for the core: the fields that were given, then those of the preset, then the defaults.

    Raises:
        CanvasError: if the numbers of a curve or of the corrector contradict each other.
    """
    fields: dict[str, Any] = {
        name: getattr(asked, name) for name in ("n", "steps", "seed", "top_p", "top_k", "label", "sampler")
    }
    curve, warp, corrector = asked.temperature, asked.warp, asked.corrector
    fields["temperature"] = (
        _built("temperature", TemperatureCurve, curve) if isinstance(curve, Curve) else curve
    )
    fields["warp"] = None if warp is None else _built("warp", TimeWarp, warp)
    fields["corrector"] = None if corrector is None else _built("corrector", Corrector, corrector)
    if asked.preset is not None:
        published = preset_fields(asked.preset)
        fields |= {name: published[name] for name in published.keys() - asked.model_fields_set}
    return ImageRequest(**fields, known=known.pixels, y=known.digits)


def _built(param: str, kind: Callable[..., _Curve], given: Any) -> _Curve:
    try:
        return kind(**given.model_dump())
    except ValueError as error:
        raise CanvasError(param, str(error)) from None


def _check_format(shape: KnownShape, num: int, response_format: ResponseFormat) -> None:
    if response_format == "png" and num > 1:
        raise CanvasError(
            "response_format", "response_format png holds one image; for n > 1 use grid, npy or b64_json"
        )
    if response_format != "npy" and shape.picture[-1] not in PNG_CHANNELS:
        raise CanvasError(
            "response_format",
            f"response_format must be npy: the pictures of this model have {shape.picture[-1]} channels, "
            "which PNG does not hold",
        )


def _check_steps(request: ImageRequest, limits: Limits) -> None:
    """Refuse what does not go with exact steps, and steps that only a preset asks for."""
    if request.steps == "exact":
        for param in ("warp", "corrector"):
            if getattr(request, param) is not None:
                raise CanvasError(
                    param, f"{param} must be null when steps is exact: it needs a grid of steps"
                )
    elif request.steps > limits.max_steps:
        raise CanvasError(
            "preset", f"the preset has {request.steps} steps; the limit is {limits.max_steps}: give steps too"
        )


def _check_work(checkpoint: Checkpoint, config: UNetConfig, request: ImageRequest, limits: Limits) -> None:
    """Refuse a request whose n * tokens * denoiser calls is over the limit, before its plans are drawn."""
    num_digits = limits.context * checkpoint.codec.target_length
    if _work(request, limits.context, num_digits) <= limits.max_work:
        return  # whatever is known
    canvas = image_canvas(config, checkpoint.codec, request.known, request.y)
    num_free = int(canvas.free.sum())
    if _work(request, limits.context, num_free) > limits.max_work:
        raise CanvasError(
            "steps",
            f"n * tokens * steps is at most {limits.max_work}, with {limits.context} tokens and steps counted up to "
            f"the {num_free} free sub-tokens (with a corrector every step counts, and one more, and each masking "
            "anew as a sub-token); lower n, steps or corrector.scale",
        )


def _work(request: ImageRequest, num_tokens: int, num_free: int) -> float:
    """Return what n rows cost: tokens times calls, or the size of their plans if that is larger."""
    if request.steps == "exact":
        return request.n * num_tokens * num_free
    if request.corrector is None:
        one_more = request.warp is not None  # what a warped grid leaves is revealed in a call of its own
        return request.n * num_tokens * min(request.steps + one_more, num_free)
    # A corrector masks a digit `scale` times on average, at most once a step: that bounds the plan.
    times_masked = min(request.corrector.scale, request.steps)
    return request.n * max(num_tokens * (request.steps + 1), num_free * (1 + times_masked))


def _answer(
    request_id: str, queue: ModelQueue, response_format: ResponseFormat, prepared: PreparedRows, job: Job
) -> ImagesAnswer:
    finished = [finish_row(queue.checkpoint, prepared, row) for row in prepared.rows]
    samples = [sample for sample in finished if isinstance(sample, ImageSample)]
    assert len(samples) == len(finished), "an image model makes images"
    rows = [(sample.nfe, sample.steps_skipped) for sample in samples]
    headers = {"X-Seed": str(samples[0].seed), "X-NFE": str(sum(nfe for nfe, _ in rows))}
    pictures = np.stack([sample.pixels.numpy() for sample in samples])
    if response_format == "b64_json":
        response = _response(request_id, queue, samples, job)
        return ImagesAnswer(
            response.model_dump_json().encode(), "application/json", {}, response.timings, rows
        )
    if response_format == "npy":
        content, media_type = to_npy(pictures), "application/octet-stream"
    else:
        content, media_type = to_png(to_grid(pictures)), "image/png"
    return ImagesAnswer(content, media_type, headers, timings_of(job), rows)


def _response(request_id: str, queue: ModelQueue, samples: Sequence[ImageSample], job: Job) -> ImagesResponse:
    names = queue.checkpoint.config.label_names
    images = [
        ImageOutput(
            b64_json=base64.b64encode(to_png(sample.pixels.numpy())).decode(),
            label=sample.label,
            label_name=names[sample.label] if names and sample.label is not None else None,
            seed=sample.seed,
            nfe=sample.nfe,
            steps=sample.steps,
            steps_skipped=sample.steps_skipped,
        )
        for sample in samples
    ]
    usage = ImagesUsage(images=len(images), denoiser_calls=sum(image.nfe for image in images))
    return ImagesResponse(
        id=request_id, model=queue.name, images=images, usage=usage, timings=timings_of(job)
    )
