"""The one shape of every error answer: {"error": {"message", "type", "code", "param"}}.

No message repeats what the client sent, so an answer stays small and carries nothing foreign.
"""

from __future__ import annotations

import logging
import secrets
import traceback
from collections.abc import Mapping
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from server.http.head import WITHOUT_HEAD
from server.http.http_metrics import METHODS
from server.schemas.base import ErrorBody, ErrorInfo

logger = logging.getLogger("prime.server")

MAX_FRAMES = 12  # of an exception in the log
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "overloaded_error",
    504: "timeout_error",
}
_ROUTING = {
    404: ("not_found", "there is no such route; see /docs for the list"),
    405: (
        "method_not_allowed",
        "this route does not take this method; the Allow header lists those it takes",
    ),
}


class ApiError(Exception):
    """An error with its HTTP answer."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the answer.

        Args:
            status: HTTP status, 400..599.
            code: a short stable name for programs.
            message: one sentence for people: which limit, and the remedy. Never text of the client.
            param: the field of the request that is at fault.
            headers: extra headers of the answer.
        """
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = {} if headers is None else dict(headers)

    def body(self) -> ErrorBody:
        """Return the body of the answer."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        info = ErrorInfo(
            message=self.message[:2000],
            type=_TYPES.get(self.status, fallback),
            code=self.code,
            param=self.param,
        )
        return ErrorBody(error=info)

    def response(self) -> JSONResponse:
        """Return the HTTP answer."""
        return JSONResponse(self.body().model_dump(), self.status, self.headers)


def new_request_id() -> str:
    """Return a fresh id for the header X-Request-Id."""
    return f"req-{secrets.token_hex(12)}"


def allowed_methods(app: FastAPI, request: Request) -> list[str]:
    """Return the methods that some route takes on the path of a request, in alphabetical order."""
    scope = dict(request.scope)
    found = {
        method
        for method in METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in app.routes)
    }
    if "GET" in found and scope["path"] not in WITHOUT_HEAD:
        found.add("HEAD")
    return sorted(found)


def unexpected() -> ApiError:
    """Return the answer to an exception that nobody expected."""
    return ApiError(500, "internal_error", "the server failed on this request; its log says why")


def internal_error(request_id: str, error: Exception) -> ApiError:
    """Log an exception that nobody expected, and return its answer.

    What it is and where it came from is logged, but not its text, which may hold a part of the request.
    """
    frames = traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]
    where = " < ".join(
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames)
    )
    logger.error("%s: unexpected %s at %s", request_id, type(error).__name__, where)
    return unexpected()


def install_error_handlers(app: FastAPI) -> None:
    """Make every failure of `app` that somebody foresaw, also of routing, answer in the one shape."""

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def routing_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code, message = _ROUTING.get(error.status_code, ("http_error", "the request cannot be served"))
        headers = {}
        if error.status_code == 405:  # Starlette names the methods of one route, but a path may have several
            headers["Allow"] = ", ".join(allowed_methods(app, request))
        return ApiError(error.status_code, code, message, headers=headers).response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, routing_error)
