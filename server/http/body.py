"""Reads a JSON request body within bounds of size and time, before anything trusts it.

FastAPI's own reader buffers without bound, waits for ever, and lets duplicate keys, NaN and lone surrogates
pass; so the route calls this one instead.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, Never

from fastapi import Request

from server.http.errors import ApiError

# A client that is cut off while it still sends often never sees the answer: its unread bytes make the kernel
# reset the connection. So a body over the limit is read on and thrown away, up to this many bytes.
DISCARD_BYTES = 2**24
_LONGEST_NUMBER = 1000
_INTEGER_BOUND = 2**64
_LONGEST_INTEGER = len(str(_INTEGER_BOUND)) + 1  # with its sign


async def read_json(request: Request, max_bytes: int, timeout_s: float) -> object:
    """Return the parsed JSON body of a request.

    A number that no field can take (NaN, an infinity, an overflow, minus zero, an integer of 2^64 or more in
    magnitude) comes back as NaN, so that the schema refuses it by the name of its field.

    Args:
        request: the request; its body must not have been read.
        max_bytes: largest body.
        timeout_s: seconds in which the whole body must arrive.

    Raises:
        ApiError: 400 for what is not JSON or has no clear length, 415 for a type or an encoding that is not
            plain JSON, 413 for a body over the limit, 408 for one that comes too slowly, 422 for a duplicate
            key.
        ClientDisconnect: if the client went away.
    """
    _check_head(request)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _receive(request, max_bytes)
    except TimeoutError:
        raise ApiError(
            408,
            "receive_timeout",
            f"the body did not arrive within {timeout_s:g} seconds",
            headers={"Connection": "close"},
        ) from None
    return parse_json(body)


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


async def _receive(request: Request, max_bytes: int) -> bytes:
    # h11 has checked that a Content-Length is a plain number.
    declared = int(request.headers.get("content-length", "0"))
    # Nothing to throw away if the client waits for leave to send, and too much if it declares a huge body.
    allowed = max_bytes if "expect" in request.headers else max_bytes + DISCARD_BYTES
    if declared > allowed:
        raise _too_large(max_bytes)
    body = bytearray()
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes + DISCARD_BYTES:
            break
        if received <= max_bytes:
            body += chunk
        else:
            body.clear()
    if received > max_bytes:
        raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> ApiError:
    message = f"the body is over the limit of {max_bytes} bytes"
    return ApiError(413, "body_too_large", message, headers={"Connection": "close"})


def parse_json(body: bytes) -> object:
    """Return the value of a JSON text; numbers out of any field's range become NaN (see `read_json`).

    Raises:
        ApiError: 400 for what is not JSON in UTF-8 or is nested too deeply, 422 for a duplicate key.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(
            400, "invalid_utf8", f"the body is not UTF-8: bad byte at offset {error.start}"
        ) from None
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=lambda _: math.nan,
        )
    except json.JSONDecodeError as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: see character {error.pos}") from None
    except RecursionError:
        raise ApiError(400, "invalid_json", "the JSON of the body is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        _refuse_duplicates()
    return result


def _refuse_duplicates() -> Never:
    raise ApiError(422, "duplicate_key", "a key of the body appears twice in one object; send each key once")


def _integer(text: str) -> int | float:
    if len(text) > _LONGEST_INTEGER or text == "-0":  # before int(), whose cost is quadratic in the length
        return math.nan
    value = int(text)
    return value if abs(value) < _INTEGER_BOUND else math.nan


def _number(text: str) -> float:
    value = float(text) if len(text) <= _LONGEST_NUMBER else math.nan
    minus_zero = value == 0 and text.startswith("-")
    return math.nan if math.isinf(value) or minus_zero else value
