"""GET /, the playground, and the files it is made of: a page without a build step that loads nothing from elsewhere.

A request only ever looks a name up in a table that was read at the start, so no path can lead out of the folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.http.errors import ApiError

FOLDER = Path(__file__).resolve().parent.parent / "playground"
PAGE = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Kept, but asked for again each time: a new version of the server never meets scripts of the old one.
    "Cache-Control": "no-cache",
}


class Asset(NamedTuple):
    """One file of the page.

    Attributes:
        content: its bytes.
        headers: all headers of its answer but the length.
    """

    content: bytes
    headers: dict[str, str]


def load_assets(folder: Path = FOLDER) -> dict[str, Asset]:
    """Return the files of the page by name.

    Args:
        folder: holds them, and nothing else; no folders.
    """
    assets = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        assets[path.name] = Asset(
            content, {**_HEADERS, "Content-Type": MEDIA_TYPES[path.suffix], "ETag": tag}
        )
    return assets


def router() -> APIRouter:
    """Return the routes of the page: it at /, its other files under /playground/."""
    routes = APIRouter(include_in_schema=False)
    assets = load_assets()

    @routes.get("/")
    async def get_page(request: Request) -> Response:
        return _answer(assets[PAGE], request)

    @routes.get("/playground/{name}")
    async def get_asset(name: str, request: Request) -> Response:
        if name == PAGE or name not in assets:
            raise ApiError(404, "not_found", "the playground has no such file")
        return _answer(assets[name], request)

    return routes


def _answer(asset: Asset, request: Request) -> Response:
    known = request.headers.get("if-none-match", "")
    tags = {tag.strip().removeprefix("W/") for tag in known.split(",")}
    if asset.headers["ETag"] in tags or known.strip() == "*":
        kept = {name: value for name, value in asset.headers.items() if name != "Content-Type"}
        return Response(status_code=304, headers=kept)
    return Response(asset.content, headers=asset.headers)
