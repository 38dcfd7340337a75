"""POST /v1/images/generations with ``stream``: some pictures on the way, then the finished one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from prime_core.checkpoint import Checkpoint
from prime_core.sampling.prepare import PreparedRows
from server.engine.feed import RowChange
from server.http.sse import frame
from server.images.generations import size_of, usage_of
from server.images.png import ProvisionalPng
from server.request import Running
from server.schemas.generations import CompletedImageEvent, PartialImageEvent
from server.schemas.images import ImagesResponse


async def stream_generation(
    running: Running[PreparedRows, ImagesResponse], num_partial: int, created: int
) -> AsyncIterator[bytes]:
    """Yield the frames of a stream.

    Args:
        running: the request for one image, started to be followed.
        num_partial: most pictures before the finished one.
        created: Unix time of the request in seconds.
    """
    checkpoint = running.queue.checkpoint
    size = size_of(checkpoint)
    pictures = PartialPictures(checkpoint, running.prepared.rows[0].plan.nfe, num_partial)
    async for changes in running.changes():
        picture = await running.in_thread(pictures.next_of, changes.rows)
        if picture is not None:
            index = pictures.num_shown - 1
            event = PartialImageEvent(
                b64_json=picture, created_at=created, size=size, partial_image_index=index
            )
            yield frame(event, event.type)
    (image,) = (await running.answer()).images
    usage = usage_of(checkpoint, 1)
    completed = CompletedImageEvent(b64_json=image.b64_json, created_at=created, size=size, usage=usage)
    yield frame(completed, completed.type)


class PartialPictures:
    """Chooses when to show an image in the middle of sampling: after equal shares of its denoiser calls.

    A reader that is slow may miss the time of a picture, and then gets fewer.

    Attributes:
        num_shown: pictures shown so far.
    """

    def __init__(self, checkpoint: Checkpoint, num_calls: int, num_partial: int) -> None:
        """Begin with nothing shown.

        Args:
            checkpoint: the model.
            num_calls: denoiser calls of the image.
            num_partial: most pictures.
        """
        self._png = ProvisionalPng(checkpoint)
        self._num_calls = num_calls
        self._due = [share * num_calls / (num_partial + 1) for share in range(1, num_partial + 1)]
        self.num_shown = 0

    def next_of(self, rows: Sequence[RowChange]) -> str | None:
        """Return a PNG file in base64 if the image, the only one, is to be shown now."""
        for row in rows:
            passed = [due for due in self._due if due <= row.nfe]
            self._due = self._due[len(passed) :]
            if passed and row.nfe < self._num_calls:
                self.num_shown += 1
                return self._png.of(row.y)
        return None
