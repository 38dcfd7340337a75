"""What FastAPI cannot know of /openapi.json: headers, keys, and the errors that any route can answer with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from server.http.access import REQUEST_ID_PATTERN
from server.http.deadline import HEADER as TIMEOUT_HEADER
from server.http.error_codes import ERROR_CODES
from server.http.head import WITHOUT_HEAD
from server.http.security import OPEN_PATHS
from server.routes.openapi import SAMPLING_STATUS, error_responses

_ID_HEADER = "X-Request-Id"
_HEADERS_OF_STATUS = {"401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}
_SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"basic": []}]


def complete_document(
    document: dict[str, Any], max_request_s: float, *, with_keys: bool, with_traces: bool
) -> None:
    """Add to an OpenAPI document what holds for all routes.

    Args:
        document: as FastAPI makes it; it is changed.
        max_request_s: the longest time of a request, in seconds.
        with_keys: whether the server asks for API keys.
        with_traces: whether it sends traces.
    """
    document["info"]["description"] = (
        f"Every route that answers GET answers HEAD too, but {' and '.join(sorted(WITHOUT_HEAD))}."
    )
    components = document.setdefault("components", {})
    components["parameters"] = _parameters(max_request_s) | (_TRACES if with_traces else {})
    components["headers"] = _HEADERS
    if with_keys:
        components["securitySchemes"] = _SCHEMES
    document["x-errors"] = [
        {"status": each.status, "code": each.code, "meaning": each.meaning}
        for each in ERROR_CODES
        if with_keys or each.status != 401
    ]
    for path, operation in _operations(document):
        _complete(path, operation, with_keys=with_keys and path not in OPEN_PATHS, with_traces=with_traces)


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            yield path, operation


def _complete(path: str, operation: dict[str, Any], *, with_keys: bool, with_traces: bool) -> None:
    responses = operation["responses"]
    samples = SAMPLING_STATUS in responses
    for status, response in error_responses().items():
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
        described = {"description": response["description"], "content": content}
        responses.setdefault(str(status), described)
    if with_keys:
        operation["security"] = _SECURITY
    else:
        del responses["401"]
    if path in OPEN_PATHS:  # which are answered in any crowd, and to anybody
        del responses["403"], responses["429"]
    operation["responses"] = dict(sorted(responses.items()))
    for status, response in responses.items():
        named = [_ID_HEADER]
        if status in _HEADERS_OF_STATUS and (samples or status != "503"):
            named.append(_HEADERS_OF_STATUS[status])
        references = {name: {"$ref": f"#/components/headers/{name}"} for name in named}
        response["headers"] = {**response.get("headers", {}), **references}
    headers = [_ID_HEADER, *([TIMEOUT_HEADER] if samples else []), *(_TRACES if with_traces else [])]
    operation.setdefault("parameters", []).extend(
        {"$ref": f"#/components/parameters/{name}"} for name in headers
    )


def _parameters(max_request_s: float) -> dict[str, Any]:
    return {
        _ID_HEADER: {
            "name": _ID_HEADER,
            "in": "header",
            "required": False,
            "description": "a name of your own for the request: 1 to 64 letters, digits, '.', '_' and '-', of which "
            "the first is a letter or a digit; without it, or if it is none, the server makes one",
            "schema": {"type": "string", "pattern": f"^{REQUEST_ID_PATTERN}$"},
        },
        TIMEOUT_HEADER: {
            "name": TIMEOUT_HEADER,
            "in": "header",
            "required": False,
            "description": f"seconds above 0 and at most {max_request_s:g}, in digits with or without a decimal "
            "point: a request that is not answered by then gets 504",
            "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": max_request_s},
        },
    }


_TRACES: dict[str, Any] = {
    "traceparent": {
        "name": "traceparent",
        "in": "header",
        "required": False,
        "description": "the span that the request belongs to, as in W3C Trace Context: its own is below it; without "
        "it, or if it is none, a trace begins here",
        "schema": {"type": "string", "pattern": "^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"},
    },
}
_HEADERS: dict[str, Any] = {
    _ID_HEADER: {
        "description": "the name of the request, which its line in the server's log begins with",
        "schema": {"type": "string"},
        "required": True,
    },
    "Retry-After": {
        "description": "of 429, and of 503 while the server shuts down: seconds after which another try may succeed",
        "schema": {"type": "integer"},
    },
    "WWW-Authenticate": {
        "description": "of 401: the ways to send a key, each in a field of its own",
        "schema": {"type": "string"},
    },
}
_SCHEMES: dict[str, Any] = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "an API key as the header Authorization: Bearer KEY",
    },
    "basic": {
        "type": "http",
        "scheme": "basic",
        "description": "an API key as the password of HTTP Basic, with any user name: a browser asks for it",
    },
}
