"""Keeps pages of other sites from using a server through the browser of somebody who may reach it.

A page anywhere can make its reader's browser ask http://127.0.0.1:8000. Two things stand against that:

- A browser says whose page caused a request (``Sec-Fetch-Site``). Those of others start no work, unless they bring a
  key that no browser adds by itself (``Authorization: Bearer``).
- A page cannot read answers of another site; but whoever owns a domain can let its name point to 127.0.0.1 once the
  page is loaded (DNS rebinding), and then it is the same site. Then ``Host`` has that name. So a server that only this
  machine can reach, and that asks for no key, answers to no names but those of this machine.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.errors import ApiError
from server.http.keys import KeyRing
from server.http.security import OPEN_PATHS, comes_from_own_site

ANY_HOST = "*"
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^][:]*)(:[0-9]*)?")
# Asked for by an address, and work all the same.
_WORK_BY_ADDRESS = frozenset({"/images"})


class RefuseOtherSites:
    """Middleware: answers 403 to names that are not this server's, and to work that pages of other sites cause."""

    def __init__(self, app: ASGIApp, host: str, allowed_hosts: Collection[str], keys: KeyRing) -> None:
        """Put a doorkeeper before an app.

        Args:
            app: what is behind it.
            host: address that is listened on.
            allowed_hosts: more names of the server; any of them makes names count wherever it listens.
            keys: with keys, a page of another site can read nothing, and names do not count.
        """
        self.app = app
        self._allowed = frozenset(allowed_hosts)
        self._is_local = is_loopback(host)
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            if self._names_count and not self._is_ours(scope):
                await _unknown_host().response()(scope, receive, send)
                return
            if _is_work(scope) and not comes_from_own_site(scope) and not _brings_bearer(scope):
                await _cross_site().response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    @property
    def _names_count(self) -> bool:
        if ANY_HOST in self._allowed:
            return False
        return bool(self._allowed) or (self._is_local and not self._keys)

    def _is_ours(self, scope: Scope) -> bool:
        """Whether a request is to a name of the server; one without any, of HTTP/1.0, is no browser's."""
        values = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        hosts = [found[1].removesuffix(".") for value in values if (found := _HOST.fullmatch(value))]
        return len(hosts) == len(values) and all(
            host in self._allowed or _is_no_domain(host) or _is_localhost(host) for host in hosts
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on a host: a name, or an address without brackets."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return _is_localhost(host.lower())


def parse_hosts(value: object) -> tuple[str, ...]:
    """Return the names of hosts that a setting holds, in lower case.

    Args:
        value: names between commas, or a list of them.

    Raises:
        ValueError: if a part is no name, but perhaps an address with a port.
    """
    parts = value.split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, Sequence) else [parts]
    names = tuple(part.strip().lower() if isinstance(part, str) else "" for part in parts)
    if not all(name == ANY_HOST or _NAME.fullmatch(name) for name in names):
        raise ValueError(
            "must be names of hosts between commas, such as prime.example, without scheme and port; or * for any"
        )
    return names


def _is_localhost(host: str) -> bool:
    return host == "localhost" or host.endswith(".localhost")


def _is_no_domain(host: str) -> bool:
    """Whether a host is an address: nobody's name can come to point to another one."""
    return host.startswith("[") or host.rpartition(".")[2].isdecimal()


def _is_work(scope: Scope) -> bool:
    return scope["method"] == "POST" or scope["path"] in _WORK_BY_ADDRESS


def _brings_bearer(scope: Scope) -> bool:
    return any(
        name == b"authorization" and value.lower().startswith(b"bearer ") for name, value in scope["headers"]
    )


def _unknown_host() -> ApiError:
    return ApiError(
        403,
        "unknown_host",
        "this server does not go by the name that it was asked under; ask for localhost or 127.0.0.1, or start it with "
        "--allowed-hosts and the name",
    )


def _cross_site() -> ApiError:
    return ApiError(
        403,
        "cross_site",
        "a page of another site has caused this request; use the playground of this server, or send the header "
        "Authorization: Bearer KEY, with any key if none is asked for",
    )
