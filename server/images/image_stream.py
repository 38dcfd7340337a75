"""POST /images with ``stream``: pictures as they are uncovered, then the usual answer in JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator

from prime_core.checkpoint import Checkpoint
from prime_core.sampling.prepare import PreparedRows
from server.denoise import denoise_fields
from server.engine.feed import Changes, RowChange
from server.http.sse import frame, json_frame
from server.images.image_answer import ImagesBody
from server.images.png import ProvisionalPng
from server.request import Running
from server.schemas.denoise import ImageFrame
from server.schemas.images import ImagesRequest


async def stream_images(
    running: Running[PreparedRows, ImagesBody], body: ImagesRequest
) -> AsyncIterator[bytes]:
    """Yield the frames of a stream.

    Args:
        running: the request, started to be followed, of which the answer is JSON.
        body: of the request.
    """
    pictures = Pictures(running.queue.checkpoint, body.n, body.preview_every)
    async for changes in running.changes():
        for each in await running.in_thread(pictures.frames, changes):
            yield frame(each, "denoise")
    yield json_frame((await running.answer()).content)


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
