"""HEAD on every route that takes GET: monitors ask so. The answer is that to GET, of which only the head is sent."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

# A picture is work, of which the head would be a small part of the answer.
WITHOUT_HEAD = frozenset({"/images"})


class AnswerHead:
    """Middleware: hands HEAD on as GET. The protocol, which sees HEAD, leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        """Surround an app.

        Args:
            app: what answers.
        """
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or scope["path"] in WITHOUT_HEAD:
            await self.app(scope, receive, send)
            return
        asked = {**scope, "method": "GET"}
        try:
            await self.app(asked, receive, send)
        finally:
            if "route" in asked:  # for the log
                scope["route"] = asked["route"]
