"""How many requests are at work at once: as many as there may be connections, and the probes of a supervisor besides.

Beyond that a connection that is at rest is closed for each new one (`DeadlineProtocol`), so it only comes to this when
every connection is at work.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.errors import ApiError
from server.http.security import OPEN_PATHS
from server.metrics import Metrics

RETRY_AFTER_S = 1  # until some request has ended; which one and when, nobody knows


class RefuseCrowds:
    """Middleware: answers 429 while as many requests as are allowed have no whole answer; not to /health and /ready."""

    def __init__(self, app: ASGIApp, max_requests: int, metrics: Metrics) -> None:
        """Put a doorkeeper before an app.

        Args:
            app: what is behind it.
            max_requests: most requests inside.
            metrics: where refusals are counted.
        """
        self.app = app
        self._max_requests = max_requests
        self._metrics = metrics
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        if self._inside >= self._max_requests:
            self._metrics.reject("", "busy")
            await busy(f"all {self._max_requests} connections are at work").response()(scope, receive, send)
            return
        self._inside += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._inside -= 1


def busy(why: str) -> ApiError:
    """Return the answer to a request that there is no room for."""
    headers = {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"}
    return ApiError(429, "server_busy", f"{why}; try again in {RETRY_AFTER_S} s", headers=headers)
