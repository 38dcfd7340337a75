"""POST /generate with ``stream``: the text as it is uncovered, then the usual answer."""

from __future__ import annotations

from collections.abc import AsyncIterator

from prime_core.checkpoint import Checkpoint
from prime_core.sampling.prepare import PreparedRows
from prime_core.sampling.provisional import provisional_text
from server.denoise import denoise_fields
from server.engine.feed import Changes
from server.http.sse import frame
from server.request import Running
from server.schemas.denoise import TextFrame
from server.schemas.text import GenerateResponse


async def stream_text(running: Running[PreparedRows, GenerateResponse]) -> AsyncIterator[bytes]:
    """Yield the frames of a stream.

    Args:
        running: the request, started to be followed.
    """
    checkpoint = running.queue.checkpoint
    gaps = [(part.start, part.stop) for part in running.prepared.canvas.segments if part.gap]
    told: set[int] = set()  # the outputs whose first frame is out
    async for changes in running.changes():
        for each in await running.in_thread(text_frames, checkpoint, changes):
            layout = None if each.output in told else gaps
            told.add(each.output)
            yield frame(each.model_copy(update={"gaps": layout}), "denoise")
    yield frame(await running.answer())


def text_frames(checkpoint: Checkpoint, changes: Changes) -> list[TextFrame]:
    """Return one frame for every output that changed."""
    codec, tokenizer = checkpoint.codec, checkpoint.tokenizer
    return [
        TextFrame(
            **denoise_fields(changes, row, codec.mask_index),
            **provisional_text(codec, tokenizer, row.y, row.positions)._asdict(),
        )
        for row in changes.rows
    ]
