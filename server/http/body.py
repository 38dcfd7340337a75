"""Reads a JSON request body within bounds of size and time, before anything trusts it.

FastAPI's own reader buffers without bound, waits for ever, and lets duplicate keys, NaN and lone surrogates
pass; so the routes call this one instead.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request

from server.http.crowd import busy
from server.http.errors import ApiError
from server.http.json_text import parse_json
from server.metrics import Metrics

# A client that is cut off while it still sends often never sees the answer: its unread bytes make the kernel
# reset the connection. So a body over the limit is read on and thrown away, up to this many bytes.
DISCARD_BYTES = 2**24
# Larger ones take milliseconds to parse, in which the event loop would answer nobody.
_PARSED_AT_ONCE_BYTES = 2**16
# So much of each body needs no room of the common one, so that large bodies never keep small ones out.
FREE_BYTES = 2**16


class Bodies:
    """Reads the bodies of requests.

    Attributes:
        held_bytes: of large bodies that are arriving or wait to be parsed, beyond what is free of each.
    """

    def __init__(self, max_bytes: int, max_held_bytes: int, timeout_s: float, metrics: Metrics) -> None:
        """Have read nothing yet.

        Args:
            max_bytes: largest body.
            max_held_bytes: most bytes of large bodies held at once.
            timeout_s: seconds in which a whole body must arrive.
            metrics: where a refusal for want of room is counted.
        """
        self.held_bytes = 0
        self._max_bytes = max_bytes
        self._max_held_bytes = max_held_bytes
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._parser = ThreadPoolExecutor(1, "prime-json")

    async def read_json(self, request: Request) -> object:
        """Return the parsed JSON body of a request; see `parse_json` for numbers that no field can take.

        Args:
            request: the request; its body must not have been read.

        Raises:
            ApiError: 400 for what is not JSON or has no clear length, 415 for a type or an encoding that is not
                plain JSON, 413 for a body over the limit, 408 for one that comes too slowly, 422 for a duplicate
                key, 429 for one that there is no room for.
            ClientDisconnect: if the client went away.
        """
        _check_head(request)
        body = bytearray()
        try:
            await self._receive(request, body)
            if len(body) <= _PARSED_AT_ONCE_BYTES:
                return parse_json(body)
            return await asyncio.get_running_loop().run_in_executor(self._parser, parse_json, body)
        finally:
            self._let_go(body)

    async def _receive(self, request: Request, body: bytearray) -> None:
        """Read what arrives into ``body``, which is empty."""
        # h11 has checked that a Content-Length is a plain number.
        declared = int(request.headers.get("content-length", "0"))
        # Nothing to throw away if the client waits for leave to send, and too much if it declares a huge body.
        allowed = self._max_bytes if "expect" in request.headers else self._max_bytes + DISCARD_BYTES
        if declared > allowed:
            raise _too_large(self._max_bytes)
        received, fits = 0, True
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    received += len(chunk)
                    if received > self._max_bytes + DISCARD_BYTES:
                        break
                    fits = fits and received <= self._max_bytes and self._take_room(len(body), received)
                    if fits:
                        body += chunk
                    else:
                        self._let_go(body)
        except TimeoutError:
            if fits and declared <= self._max_bytes:  # else more time would not help
                raise _too_late(self._timeout_s) from None
        if max(received, declared) > self._max_bytes:
            raise _too_large(self._max_bytes)
        if not fits:
            self._metrics.reject("", "busy")
            raise busy(
                f"bodies on their way already take the {self._max_held_bytes} bytes that there are for them"
            )

    def _take_room(self, old_bytes: int, new_bytes: int) -> bool:
        """Take room for a body that grows; return whether there was enough."""
        more = _counted(new_bytes) - _counted(old_bytes)
        if more and self.held_bytes + more > self._max_held_bytes:
            return False
        self.held_bytes += more
        return True

    def _let_go(self, body: bytearray) -> None:
        """Give the room of a body back, and throw it away."""
        self.held_bytes -= _counted(len(body))
        body.clear()


def _counted(num_bytes: int) -> int:
    return max(0, num_bytes - FREE_BYTES)


def _check_head(request: Request) -> None:
    if "content-length" in request.headers and "transfer-encoding" in request.headers:
        message = "send either Content-Length or Transfer-Encoding: both together are ambiguous"
        raise ApiError(400, "ambiguous_length", message, headers={"Connection": "close"})
    media_type, *parameters = request.headers.get("content-type", "").lower().split(";")
    charsets = {value.strip().replace('"', "") for value in parameters}
    if media_type.strip() != "application/json" or not charsets <= {"", "charset=utf-8"}:
        raise ApiError(
            415, "unsupported_media_type", "send JSON in UTF-8 with the header Content-Type: application/json"
        )
    if request.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
        raise ApiError(415, "unsupported_encoding", "compressed bodies are not read; send the JSON as it is")


def _too_late(timeout_s: float) -> ApiError:
    message = f"the body did not arrive within {timeout_s:g} seconds"
    return ApiError(408, "receive_timeout", message, headers={"Connection": "close"})


def _too_large(max_bytes: int) -> ApiError:
    message = f"the body is over the limit of {max_bytes} bytes"
    return ApiError(413, "body_too_large", message, headers={"Connection": "close"})
