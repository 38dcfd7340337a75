"""Asks for an API key before any route but /health and /ready, when keys are set.

A key comes as ``Authorization: Bearer KEY``, or as the password of HTTP Basic, which is how a browser asks its user.
The user name of Basic is not looked at. A browser sends a password that it remembers with whatever any page asks of
this server, so Basic does not count in a request that a page of another site has caused (`comes_from_own_site`).
"""

from __future__ import annotations

import base64

from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.errors import ApiError
from server.http.keys import KeyRing

OPEN_PATHS = frozenset({"/health", "/ready"})
# Browsers read one challenge of a header field, so each has a field of its own.
CHALLENGES = ('Bearer realm="prime"', 'Basic realm="prime", charset="UTF-8"')
# none: the user's own doing, such as an address that was typed.
_OWN_SITE = frozenset({b"same-origin", b"none"})


class RequireKey:
    """Middleware: answers 401 unless a request brings a key that is accepted; notes the key's name for the log."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        """Put a door before an app; one without keys stands open.

        Args:
            app: what is behind it.
            keys: which are accepted.
        """
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not self.keys or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        key = _key_of(scope)
        name = None if key is None else self.keys.name_of(key)
        if name is None:
            await _refuse(scope, receive, send)
            return
        scope.setdefault("state", {})["key_name"] = name
        await self.app(scope, receive, send)


def comes_from_own_site(scope: Scope) -> bool:
    """Whether a request was caused by a page of this server, by a user, or by no browser (or one that does not say)."""
    return all(value in _OWN_SITE for name, value in scope["headers"] if name == b"sec-fetch-site")


def _key_of(scope: Scope) -> bytes | None:
    """Return the key that a request brings, unchecked; None if it brings none, or two."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, rest = values[0].partition(b" ")
    if scheme.lower() == b"bearer":
        return bytes(rest.strip())
    if scheme.lower() != b"basic" or not comes_from_own_site(scope):
        return None
    try:
        pair = base64.b64decode(rest.strip(), validate=True)
    except ValueError:
        return None
    return pair.partition(b":")[2]  # empty without a colon, and that is no key


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(
        401,
        "invalid_api_key",
        "this server asks for an API key; send it as the header Authorization: Bearer KEY",
    ).response()
    for challenge in CHALLENGES:
        error.headers.append("WWW-Authenticate", challenge)
    await error(scope, receive, send)
