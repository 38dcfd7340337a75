"""POST /images with ``stream``: pictures as they are uncovered, then the usual answer in JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

from fastapi import Request

from prime_core.checkpoint import Checkpoint
from prime_core.prepare import PreparedRows
from server.denoise import denoise_fields
from server.engine.feed import Changes, RowChange
from server.engine.model_queue import ModelQueue
from server.http.sse import frame
from server.images.image_answer import images_response
from server.images.images import count_images, prepare_images
from server.images.png import ProvisionalPng
from server.request import Running, Service, start_request
from server.schemas.denoise import ImageFrame
from server.schemas.images import ImagesRequest


async def stream_images(
    service: Service, queue: ModelQueue, body: ImagesRequest, request: Request
) -> AsyncIterator[bytes]:
    """Begin to answer a checked request, and return the frames of its stream.

    Args:
        service: the engine and the threads.
        queue: the model.
        body: of the request, checked against the schema of the model.
        request: the HTTP request; its body has been read.

    Raises:
        ApiError: see `start_request`. What fails later is raised by the frames.
    """
    work = partial(prepare_images, queue.checkpoint, body, "b64_json", service.limits[queue.name])
    running = await start_request(service, request, queue.name, body.n, work, followed=True)
    return _frames(running, queue, Pictures(queue.checkpoint, body.n, body.preview_every))


async def _frames(
    running: Running[PreparedRows], queue: ModelQueue, pictures: Pictures
) -> AsyncIterator[bytes]:
    async for changes in running.changes():
        for each in await running.in_thread(pictures.frames, changes):
            yield frame(each, "denoise")
    request_id = running.request.state.request_id
    answer = await running.answer(partial(images_response, request_id, queue))
    count_images(running.service.engine.metrics, answer)
    yield frame(answer)


class Pictures:
    """Makes the frames of one request, with a picture of each image every so many of its denoiser calls."""

    def __init__(self, checkpoint: Checkpoint, num_images: int, every: int) -> None:
        """Begin without a picture shown.

        Args:
            checkpoint: the model.
            num_images: images of the request.
            every: denoiser calls of an image between two pictures, 0 for none.
        """
        self._mask_index = checkpoint.codec.mask_index
        self._png = ProvisionalPng(checkpoint)
        self._every = every
        self._shown_at = [0] * num_images  # calls of each image at its last picture

    def frames(self, changes: Changes) -> list[ImageFrame]:
        """Return one frame for every image that changed."""
        return [
            ImageFrame(**denoise_fields(changes, row, self._mask_index), b64_json=self._picture(row))
            for row in changes.rows
        ]

    def _picture(self, row: RowChange) -> str | None:
        if not self._every or row.nfe - self._shown_at[row.output] < self._every:
            return None
        self._shown_at[row.output] = row.nfe
        return self._png.of(row.y)
