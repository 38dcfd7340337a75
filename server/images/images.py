"""/images between its routes and the engine: the request is prepared, run and answered."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from fastapi import Request

from prime_core.checkpoint import Checkpoint
from prime_core.sampling.canvas import CanvasError
from prime_core.sampling.prepare import PreparedRows, prepare_rows
from prime_core.sampling.request import PRESET_FIELDS
from server.engine.model_queue import ModelQueue
from server.images.image_answer import ImagesBody, check_format, images_body
from server.images.image_request import image_request_of
from server.images.image_work import check_grid, check_work
from server.images.known import KnownShape, parse_known
from server.metrics import Metrics
from server.request import Recipe, Service
from server.schemas.base import Limits, Timings
from server.schemas.images import ImagesRequest, ResponseFormat


def image_recipe(
    service: Service,
    queue: ModelQueue,
    body: ImagesRequest,
    response_format: ResponseFormat,
    request: Request,
) -> Recipe[PreparedRows, ImagesBody]:
    """Return how a checked request is answered.

    Args:
        service: the limits.
        queue: the model.
        body: of the request, checked against the schema of the model.
        response_format: of the answer.
        request: the HTTP request.
    """
    return Recipe(
        body.n,
        partial(prepare_images, queue.checkpoint, body, response_format, service.limits[queue.name]),
        partial(images_body, request.state.request_id, queue, response_format),
        partial(_count_body, queue.name),
    )


def _count_body(model: str, metrics: Metrics, answer: ImagesBody) -> None:
    count_images(metrics, model, answer.timings, answer.rows)


def count_images(metrics: Metrics, model: str, timings: Timings, rows: Sequence[tuple[int, int]]) -> None:
    """Count a request that was answered.

    Args:
        metrics: where to count.
        model: its name.
        timings: where the time went.
        rows: denoiser calls and skipped steps of each image.
    """
    metrics.request_done(model, "complete", timings.total_s, timings.queue_s, rows)
    metrics.images.labels(model).inc(len(rows))


def prepare_images(
    checkpoint: Checkpoint, body: ImagesRequest, response_format: ResponseFormat, limits: Limits
) -> PreparedRows:
    """Return the rows of a request, with their reveal plans.

    Raises:
        CanvasError: if the request does not fit the model or the limit of work.
    """
    config = checkpoint.config
    shape = KnownShape.of(config)
    check_format(shape, body.n, response_format)
    request = image_request_of(body, parse_known(body.known, shape))
    try:
        check_grid(request, limits)
        check_work(checkpoint, request, limits)
        return prepare_rows(checkpoint, request)
    except CanvasError as error:
        raise _as_sent(error, body) from None


def _as_sent(error: CanvasError, body: ImagesRequest) -> CanvasError:
    """Return an error that blames a field of the request as it was sent, not as it was filled in."""
    param = error.param
    if param == "y":  # digits come as `known` here, and are called y there
        return CanvasError("known", str(error))
    if body.preset is not None and param in PRESET_FIELDS and param not in body.model_fields_set:
        return CanvasError(
            "preset",
            f"what the preset has as {param} does not fit: {error}; give {param} too, or leave preset out",
        )
    return error
