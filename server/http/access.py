"""What surrounds every request: the bound of its head, its id, its line in the log and its place in the metrics."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.errors import ApiError, internal_error, new_request_id
from server.http.http_metrics import METHODS, OTHER, HttpMetrics

access_log = logging.getLogger("prime.access")

# uvicorn bounds a head only while it is incomplete, so one that arrives in a single read may be larger.
MAX_HEADER_BYTES = 2**16
CLIENT_GONE = 499  # nginx's: there is no status for an answer that nobody waited for
REQUEST_ID_PATTERN = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_REQUEST_ID = re.compile(REQUEST_ID_PATTERN.encode())


class HalfAnswerError(RuntimeError):
    """A request failed when half of its answer was out; the connection is closed, so that it cannot pass for whole."""


class Access(NamedTuple):
    """What was made of a request.

    Attributes:
        method: one of `METHODS`, or "other".
        route: template of a route, or "other".
        status: of the answer; 0 for none.
        started_s: `time.monotonic()` when its head had been read.
        finished_s: when it had been answered.
    """

    method: str
    route: str
    status: int
    started_s: float
    finished_s: float


class AccessMiddleware:
    """Bounds the head; gives each request an id (header X-Request-Id), one line in the log and one count.

    The id is the client's if it is made of up to 64 letters, digits, '.', '_' and '-'; else a new one. Exceptions that
    nobody expected are answered here: further out, their answers would carry no id. The line holds nothing else that a
    client can choose: neither path nor query, only the route, and the name of a loaded model. The status of an answer
    whose end was not sent is 499, whatever it began with: the client has gone, or was cut off. What is told of a
    request is left in its state, as ``access``.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, routes: Collection[str]) -> None:
        """Surround an app.

        Args:
            app: what answers.
            metrics: where to count.
            routes: templates of all routes; others are not named.
        """
        self.app = app
        self._metrics = metrics
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        started_s = time.monotonic()
        status, ended, left = 0, False, False
        app = _headers_too_large if _head_bytes(scope) > MAX_HEADER_BYTES else self.app

        async def send_with_id(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                ended = True

        async def receive_until_left() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.disconnect" and not ended:  # after the end, every client has gone
                left = True
            return message

        try:
            with self._metrics.in_progress():
                await app(scope, receive_until_left, send_with_id)
        except Exception as error:  # noqa: BLE001  # it is logged by `internal_error`, without its text
            answer = internal_error(request_id, error)
            if status:
                status = 500
                raise HalfAnswerError(request_id) from None  # its own text is not for the log
            await answer.response()(scope, receive, send_with_id)
        finally:
            if scope["state"].get("invalid_http"):
                status = 400  # its connection has said so (`server.http.protocol`)
            elif 0 < status < 400 and (left or not ended):
                status = CLIENT_GONE
            self._note(scope, status, started_s)

    def _note(self, scope: Scope, status: int, started_s: float) -> None:
        """Count a request and write its line."""
        finished_s = time.monotonic()
        seconds = finished_s - started_s
        route = getattr(scope.get("route"), "path", scope["path"])
        route = route if route in self._routes else OTHER
        method = scope["method"] if scope["method"] in METHODS else OTHER
        state = scope["state"]
        state["access"] = Access(method, route, status, started_s, finished_s)
        details = {**({"key": state["key_name"]} if "key_name" in state else {}), **_work(state)}
        note_request(self._metrics, state["request_id"], method, route, status, seconds, details)


def note_request(
    metrics: HttpMetrics,
    request_id: str,
    method: str,
    route: str,
    status: int,
    seconds: float,
    details: Mapping[str, object],
) -> None:
    """Count a request and write its line in the log.

    Args:
        metrics: where to count.
        request_id: of the request.
        method: one of `METHODS`, or "other".
        route: template of a route, or "other".
        status: of the answer; 0 for none.
        seconds: that it took.
        details: what else the line says.
    """
    metrics.done(route, method, status, seconds)
    fields = {
        "request_id": request_id,
        "method": method,
        "route": route,
        "status": status,
        "duration_s": round(seconds, 6),
        **details,
    }
    access_log.info(
        "%s %s %s %d %.1f ms%s",
        request_id,
        method,
        route,
        status,
        1000 * seconds,
        "".join(f" {name}={value}" for name, value in details.items()),
        extra={"fields": fields},
    )


def _work(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a request cost the engine."""
    jobs = state.get("jobs", [])
    work = {"model": state["model"]} if "model" in state else {}
    if not jobs:
        return work
    started_s = [job.started_s for job in jobs if job.started_s is not None]
    return {
        **work,
        "rows": sum(len(job.rows) for job in jobs),
        "nfe": sum(row.next_event for job in jobs for row in job.rows),
        "queue_s": round(min(started_s) - jobs[0].arrived_s, 6) if started_s else None,
    }


def request_id_of(scope: Scope) -> str:
    """Return the id of a request, which its state keeps: the client's if it is a plain one, else a new one."""
    state: dict[str, Any] = scope.setdefault("state", {})
    if "request_id" not in state:
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        plain = len(given) == 1 and _REQUEST_ID.fullmatch(given[0])
        state["request_id"] = bytes(given[0]).decode() if plain else new_request_id()
    return str(state["request_id"])


def _head_bytes(scope: Scope) -> int:
    fields = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return len(scope["raw_path"]) + len(scope["query_string"]) + fields


async def _headers_too_large(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(
        431,
        "headers_too_large",
        f"the head of the request is over {MAX_HEADER_BYTES} bytes",
        headers={"Connection": "close"},
    )
    await error.response()(scope, receive, send)
