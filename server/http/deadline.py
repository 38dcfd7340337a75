"""How long a request may take: the server's limit, or less if the client says so in a header."""

from __future__ import annotations

import re

from fastapi import Request

from server.http.errors import ApiError

HEADER = "X-Request-Timeout"
_SECONDS = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?")


def allowed_seconds(request: Request, max_request_s: float) -> float:
    """Return the time in which a request must be answered once it was read.

    Args:
        request: may have the header X-Request-Timeout, in seconds.
        max_request_s: the longest time there is, and the default.

    Raises:
        ApiError: 422 for a header that is no such time.
    """
    values = request.headers.getlist(HEADER)
    seconds = max_request_s
    if values:
        seconds = float(values[0]) if len(values) == 1 and _SECONDS.fullmatch(values[0]) else 0.0
        if not 0 < seconds <= max_request_s:
            raise ApiError(
                422,
                "invalid_header",
                f"the header {HEADER} must be seconds as a plain number, such as 2.5, above 0 and at most "
                f"{max_request_s:g}",
                param=HEADER,
            )
    return seconds
