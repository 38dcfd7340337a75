"""Server-sent events: the frames of a stream, and the answer that carries them.

A stream is ``event: denoise`` frames with provisional states, then the result as plain ``data:`` frames, then
``data: [DONE]``. What fails after the stream has begun arrives as ``event: error`` with the usual body of an error.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from server.http.errors import ApiError, unexpected

MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"


def frame(body: BaseModel, event: str | None = None) -> bytes:
    """Return one frame; JSON holds no raw line break, so one ``data:`` line takes it.

    Args:
        body: what the frame says.
        event: its kind; None for plain data.
    """
    return json_frame(body.model_dump_json().encode(), event)


def json_frame(body: bytes, event: str | None = None) -> bytes:
    """Return one frame of what is JSON already; see `frame`."""
    head = b"" if event is None else f"event: {event}\n".encode()
    return head + b"data: " + body + b"\n\n"


def streamed(
    frames: AsyncIterator[bytes], headers: Mapping[str, str] = MappingProxyType({})
) -> StreamingResponse:
    """Return the answer that sends frames as they come; it ends with ``[DONE]``, also after an error.

    Args:
        frames: what it sends.
        headers: more headers of the answer.
    """
    unkept = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # a proxy must not collect frames
    return StreamingResponse(_ended(frames), media_type=MEDIA_TYPE, headers={**headers, **unkept})


async def _ended(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for each in frames:
            yield each
    except ApiError as error:
        yield frame(error.body(), "error")
    except ClientDisconnect:
        return  # nobody reads it
    except Exception:
        yield frame(unexpected().body(), "error")
        raise  # for the log; the connection ends with it, as the answer does
    yield DONE
