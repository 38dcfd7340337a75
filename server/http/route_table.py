"""The routes of an application as a flat table, whatever its framework nests them in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import FastAPI


def route_table(app: FastAPI) -> list[tuple[str, str]]:
    """Return method and path template of every route, in the order in which they are tried."""
    return [(method, path) for path, methods in _walk(app.routes, "") for method in sorted(methods)]


def _walk(routes: Iterable[Any], prefix: str) -> Iterator[tuple[str, set[str]]]:
    for route in routes:
        # Of a router that FastAPI includes without copying it.
        inner = getattr(route, "original_router", None)
        if inner is not None:
            context = getattr(route, "include_context", None)
            yield from _walk(inner.routes, prefix + getattr(context, "prefix", ""))
        else:
            yield prefix + route.path, set(getattr(route, "methods", None) or {"GET"})
