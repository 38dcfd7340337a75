"""Commands for a shell that ask this very server: the examples of GET /docs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any
from urllib.parse import urlencode

from fastapi import Request

KEY_HEADER = "Authorization: Bearer KEY"
# Fields of the examples: of bodies, and of queries.
_BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "Once upon a time", "max_tokens": 16, "seed": 1},
    "/images": {"n": 1, "steps": 64, "seed": 1},
    "/score": {"text": "Once upon a time", "seed": 1},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 16, "seed": 1},
    "/v1/images/generations": {"prompt": "", "n": 1, "seed": 1},
}
_QUERIES = {"/images": {"n": 16, "seed": 1}}
# What the examples are worth is that they can be pasted into a shell, so a host is a plain name, or none of ours.
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:[0-9]{1,5})?")


def base_url(request: Request) -> str:
    """Return the address by which a client has reached the server, without a slash at its end."""
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        address, port = request.scope.get("server") or ("127.0.0.1", 8000)
        host = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    return f"{request.url.scheme}://{host}"


def examples_of(method: str, path: str, base: str, *, with_key: bool, streams: bool) -> Iterator[str]:
    """Yield commands that ask for a route.

    Args:
        method: in lower case.
        path: template of the route.
        base: address of the server.
        with_key: whether the route asks for a key.
        streams: whether its answer can be a stream.
    """
    url, headers = base + path, [KEY_HEADER] if with_key else []
    if method == "get" and path in _QUERIES:
        url += f"?{urlencode(_QUERIES[path])}"
        yield _command(url, headers, options=["--output", "images.png"])
        yield _command(url, ["Accept: application/json", *headers])
    elif method == "post" and path in _BODIES:
        yield _command(url, headers, body=_BODIES[path])
        if streams:
            yield _command(url, headers, body={**_BODIES[path], "stream": True}, options=["-N"])
    else:
        yield _command(url, headers, options=[] if method == "get" else ["-X", method.upper()])


def example_of_headers(base: str, path: str, *, with_key: bool) -> str:
    """Return a command that sends every header that requests may have to a route that takes a body."""
    headers = [*([KEY_HEADER] if with_key else []), "X-Request-Id: job-7", "X-Request-Timeout: 20"]
    return _command(base + path, headers, body=_BODIES[path], options=["-i"])


def example(command: str) -> str:
    """Return a command as HTML."""
    return f'<pre tabindex="0" role="region" aria-label="Example">{escape(command, quote=False)}</pre>\n'


def _command(
    url: str, headers: list[str], body: Mapping[str, Any] | None = None, options: list[str] | None = None
) -> str:
    words = ["curl", *(options or []), url if re.fullmatch(r"[\w:/.{}-]+", url) else f"'{url}'"]
    if body is not None:
        headers = ["Content-Type: application/json", *headers]
    lines = [" ".join(words), *(f"-H {shlex.quote(header)}" for header in headers)]
    if body is not None:
        lines.append(f"-d {shlex.quote(json.dumps(body))}")
    return " \\\n  ".join(lines)
