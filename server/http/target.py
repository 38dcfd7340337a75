"""Request targets in absolute form, ``GET http://host/path``: every server must take them (RFC 9112, section 3.2.2)."""

from __future__ import annotations

import re
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

_ABSOLUTE = re.compile(rb"https?://([^/]+)(/.*|)", re.IGNORECASE | re.DOTALL)


class OriginForm:
    """Middleware: makes a target in absolute form one that begins with the path, before anything looks at it."""

    def __init__(self, app: ASGIApp) -> None:
        """Surround an app.

        Args:
            app: what answers.
        """
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and (found := _ABSOLUTE.fullmatch(scope["raw_path"])) is not None:
            scope["raw_path"] = found[2] or b"/"
            scope["path"] = unquote(scope["raw_path"].decode("ascii"))
            # The host that the target names counts, not that of the field.
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope["headers"] = [(b"host", found[1]), *others]
        await self.app(scope, receive, send)
