"""POST /generate with ``stream``: the text as it is uncovered, then the usual answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

from fastapi import Request

from prime_core.checkpoint import Checkpoint
from prime_core.prepare import PreparedRows
from prime_core.provisional import provisional_text
from server.denoise import denoise_fields
from server.engine.feed import Changes
from server.engine.model_queue import ModelQueue
from server.http.sse import frame
from server.request import Running, Service, start_request
from server.schemas.denoise import TextFrame
from server.schemas.text import GenerateRequest
from server.text.generate import count_text, prepare_text, text_response


async def stream_text(
    service: Service, queue: ModelQueue, body: GenerateRequest, request: Request
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
    limits = service.limits[queue.name]
    running = await start_request(
        service,
        request,
        queue.name,
        body.n,
        partial(prepare_text, queue.checkpoint, body, limits),
        followed=True,
    )
    return _frames(running, queue)


async def _frames(running: Running[PreparedRows], queue: ModelQueue) -> AsyncIterator[bytes]:
    gaps = [(part.start, part.stop) for part in running.prepared.canvas.segments if part.gap]
    told: set[int] = set()  # the outputs whose first frame is out
    async for changes in running.changes():
        for each in await running.in_thread(text_frames, queue.checkpoint, changes):
            layout = None if each.output in told else gaps
            told.add(each.output)
            yield frame(each.model_copy(update={"gaps": layout}), "denoise")
    answer = await running.answer(partial(text_response, running.request.state.request_id, queue))
    count_text(running.service.engine.metrics, answer)
    yield frame(answer)


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
