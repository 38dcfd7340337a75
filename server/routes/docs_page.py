"""GET /docs: the interface on one page, rendered from the OpenAPI document. It loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from server.http.sse import MEDIA_TYPE as STREAM_TYPE
from server.routes.docs_common import common_section, errors_section
from server.routes.docs_examples import base_url, example, examples_of
from server.routes.docs_tables import code, json_schema, resolved, table, table_of_fields

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Vary": "Host",  # the examples name it
}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem;
  background: Canvas; color: CanvasText; overflow-wrap: anywhere; }
code, pre { font: 0.9em/1.5 ui-monospace, monospace; }
pre, .table { overflow-x: auto; }
pre { border: 1px solid color-mix(in srgb, CanvasText 40%, Canvas); border-radius: 4px; padding: 0.75rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 1rem 0.3rem 0; overflow-wrap: normal;
  border-bottom: 1px solid color-mix(in srgb, CanvasText 25%, Canvas); }
section { margin-top: 2rem; }
:focus-visible { outline: 3px solid Highlight; outline-offset: 2px; }
"""


def docs_router(openapi: Callable[[], dict[str, Any]]) -> APIRouter:
    """Return the route of the page.

    Args:
        openapi: gives the document to show, when all routes are there.
    """
    routes = APIRouter()

    @routes.get("/docs", include_in_schema=False)
    async def get_docs(request: Request) -> HTMLResponse:
        return HTMLResponse(render_page(openapi(), base_url(request)), headers=_HEADERS)

    return routes


def render_page(document: Mapping[str, Any], base: str) -> str:
    """Return the HTML page of an OpenAPI document: contents, and a section for each operation.

    Args:
        document: the document.
        base: address of the server, for the examples.
    """
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = f"{escape(document['info']['title'])} {escape(document['info']['version'])}"
    contents = "".join(
        f'<li><a href="#{_anchor(method, path)}"><code>{method.upper()} {escape(path)}</code></a>: '
        f"{escape(operation.get('summary', ''))}</li>\n"
        for method, path, operation in operations
    )
    sections = "".join(_section(document, base, *operation) for operation in operations)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<header><h1>{title}</h1>\n"
        '<p>For programs: <a href="openapi.json">openapi.json</a></p></header>\n'
        '<nav aria-label="Contents"><ul>\n<li><a href="#every-request">Every request</a>: keys, headers</li>\n'
        f'{contents}<li><a href="#errors">Errors</a>: their shape and all codes</li>\n</ul></nav>\n'
        f"<main>\n{common_section(document, base)}{sections}{errors_section(document)}</main>\n"
        "</body>\n</html>\n"
    )


def _anchor(method: str, path: str) -> str:
    return escape(f"{method}{path.replace('/', '-')}")


def _section(
    document: Mapping[str, Any], base: str, method: str, path: str, operation: Mapping[str, Any]
) -> str:
    anchor, answer = _anchor(method, path), operation["responses"].get("200", {})
    parts = [
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}"><code>{method.upper()} {escape(path)}</code>'
        f"</h2>\n<p>{escape(operation.get('summary', ''))}</p>\n"
    ]
    if "description" in operation:
        parts.append(f"<p>{escape(operation['description'])}</p>\n")
    for caption, schema in _inputs(document, operation):
        parts.append(table_of_fields(document, caption, schema))
    parts.extend(_answers(document, answer))
    statuses = ", ".join(code(status) for status in operation["responses"])
    parts.append(f'<p>Statuses: {statuses}; see <a href="#errors">Errors</a></p>\n')
    commands = examples_of(
        method, path, base, with_key="security" in operation, streams=STREAM_TYPE in answer.get("content", {})
    )
    parts.extend(example(command) for command in commands)
    return "".join(parts) + "</section>\n"


def _inputs(
    document: Mapping[str, Any], operation: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield caption and schema of all that a request can hold: path, query, and the body of each model."""
    parameters = [resolved(document, each) for each in operation.get("parameters", [])]
    for place, caption in (("path", "Path"), ("query", "Query")):
        fields = {
            each["name"]: {**each["schema"], "description": each["description"]}
            for each in parameters
            if each["in"] == place
        }
        if fields:
            yield caption, {"properties": fields}
    body = json_schema(document, operation.get("requestBody", {}))
    if "anyOf" in body:
        for option in body["anyOf"]:
            yield f"Body: JSON, {option['title']}", option
    elif body:
        yield "Body: JSON", body


def _answers(document: Mapping[str, Any], answer: Mapping[str, Any]) -> Iterator[str]:
    """Yield what an answer can be: its types, its fields in JSON, the events of its stream, its own headers."""
    content = answer.get("content", {})
    if content:
        yield f"<p>Answer: {' or '.join(code(media_type) for media_type in content)}</p>\n"
    schema = json_schema(document, answer)
    if schema.get("properties"):
        yield table_of_fields(document, "Answer: JSON", schema)
    stream = content.get(STREAM_TYPE)
    if stream is not None:
        yield f"<h3>Answer: {code(STREAM_TYPE)}</h3>\n<p>{escape(stream['schema']['description'])}</p>\n"
        for each in stream["x-events"]:
            if each["schema"]["title"] not in {schema.get("title"), "ErrorBody"}:  # they are told elsewhere
                name = f"event: {each['event']}" if "event" in each else "data"
                yield table_of_fields(document, f"Stream: {name}", each["schema"])
    own = {name: header for name, header in answer.get("headers", {}).items() if "$ref" not in header}
    if own:
        rows = ((code(name), escape(header["description"])) for name, header in own.items())
        yield table("Headers of the answer", ("header", "meaning"), rows)
