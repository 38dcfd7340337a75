"""From finished images to the body of an answer: JSON, PNG or .npy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prime_core.pictures import PNG_MODES, to_grid, to_npy, to_png
from prime_core.sampling.canvas import CanvasError
from prime_core.sampling.prepare import ImageSample, PreparedRows, finish_image
from server.engine.batcher import Job
from server.engine.model_queue import ModelQueue
from server.http.sampling_headers import sampling_headers
from server.images.known import KnownShape
from server.images.png import encoded_png
from server.request import timings_of
from server.schemas.base import Timings
from server.schemas.images import ImageOutput, ImagesResponse, ImagesUsage, ResponseFormat


class ImagesBody(NamedTuple):
    """What goes out.

    Attributes:
        content: the body.
        media_type: of the body.
        headers: what a body without JSON cannot say: its seed, its cost and its labels.
        timings: where the time went.
        rows: denoiser calls and skipped steps of each image.
    """

    content: bytes
    media_type: str
    headers: dict[str, str]
    timings: Timings
    rows: list[tuple[int, int]]


def check_format(shape: KnownShape, num: int, response_format: ResponseFormat) -> None:
    """Refuse a format that does not hold the pictures.

    Raises:
        CanvasError: naming the formats that do.
    """
    if response_format == "png" and num > 1:
        raise CanvasError(
            "response_format", "response_format png holds one image; for n > 1 use grid, npy or b64_json"
        )
    if response_format != "npy" and shape.picture[-1] not in PNG_MODES:
        raise CanvasError(
            "response_format",
            f"response_format must be npy: the pictures of this model have {shape.picture[-1]} channels, "
            "which PNG does not hold",
        )


def images_body(
    request_id: str, queue: ModelQueue, response_format: ResponseFormat, prepared: PreparedRows, job: Job
) -> ImagesBody:
    """Return what goes out to answer a request whose rows are finished.

    Raises:
        NonFiniteError: if a row failed.
    """
    samples = _finished(queue, prepared)
    rows = [(sample.nfe, sample.steps_skipped) for sample in samples]
    if response_format == "b64_json":
        response = _response(request_id, queue, samples, job)
        return ImagesBody(response.model_dump_json().encode(), "application/json", {}, response.timings, rows)
    pictures = np.stack([sample.pixels.numpy() for sample in samples])
    if response_format == "npy":
        content, media_type = to_npy(pictures), "application/octet-stream"
    else:
        content, media_type = to_png(to_grid(pictures)), "image/png"
    headers = sampling_headers(prepared.rows)
    labels = [str(sample.label) for sample in samples if sample.label is not None]
    if labels:
        headers["X-Labels"] = ",".join(labels)
    return ImagesBody(content, media_type, headers, timings_of(job), rows)


def images_response(request_id: str, queue: ModelQueue, prepared: PreparedRows, job: Job) -> ImagesResponse:
    """Return the answer in JSON to a request whose rows are finished.

    Raises:
        NonFiniteError: if a row failed.
    """
    return _response(request_id, queue, _finished(queue, prepared), job)


def _finished(queue: ModelQueue, prepared: PreparedRows) -> list[ImageSample]:
    return [finish_image(queue.checkpoint, prepared, row) for row in prepared.rows]


def _response(request_id: str, queue: ModelQueue, samples: Sequence[ImageSample], job: Job) -> ImagesResponse:
    names = queue.checkpoint.config.label_names
    images = [
        ImageOutput(
            b64_json=encoded_png(sample.pixels),
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
