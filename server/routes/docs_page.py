"""GET /docs: the interface on one page, rendered from the OpenAPI document. It loads nothing and runs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
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
# Fields of the examples: of bodies, and of queries.
_BODIES = {
    "/generate": {"prompt": "Once upon a time", "max_tokens": 16, "seed": 1},
    "/images": {"n": 1, "steps": 64, "seed": 1},
    "/score": {"text": "Once upon a time", "seed": 1},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 16, "seed": 1},
    "/v1/images/generations": {"prompt": "", "n": 1, "seed": 1},
}
_QUERIES = {"/images": {"n": 16, "seed": 1}}


def docs_router(openapi: Callable[[], dict[str, Any]]) -> APIRouter:
    """Return the route of the page.

    Args:
        openapi: gives the document to show; it is called by the first reader, when all routes are there.
    """
    routes = APIRouter()

    @routes.get("/docs", include_in_schema=False)
    async def get_docs() -> HTMLResponse:
        return HTMLResponse(render_page(openapi()), headers=_HEADERS)

    return routes


def render_page(document: Mapping[str, Any]) -> str:
    """Return the HTML page of an OpenAPI document: contents, and a section for each operation."""
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
    sections = "".join(_section(document, *operation) for operation in operations)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<header><h1>{title}</h1>\n"
        '<p>For programs: <a href="openapi.json">openapi.json</a></p></header>\n'
        f'<nav aria-label="Routes"><ul>\n{contents}</ul></nav>\n'
        f"<main>\n{sections}</main>\n</body>\n</html>\n"
    )


def _anchor(method: str, path: str) -> str:
    return escape(f"{method}{path.replace('/', '-')}")


def _section(document: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]) -> str:
    anchor = _anchor(method, path)
    parts = [
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}"><code>{method.upper()} {escape(path)}</code>'
        f"</h2>\n<p>{escape(operation.get('summary', ''))}</p>\n"
    ]
    for caption, schema in _inputs(document, operation):
        parts.append(_table(document, caption, schema))
    statuses = []
    for status, response in operation["responses"].items():
        schema = _json_schema(document, response)
        if status == "200" and schema.get("properties"):
            parts.append(_table(document, "Answer: JSON", schema))
        statuses.append(f"<code>{escape(status)}</code>")
    parts.append(f"<p>Statuses: {', '.join(statuses)}</p>\n")
    parts.append(_example(method, path))
    return "".join(parts) + "</section>\n"


def _inputs(
    document: Mapping[str, Any], operation: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield caption and schema of all that a request can hold: query, and the body of each model."""
    parameters = operation.get("parameters", [])
    if parameters:
        fields = {item["name"]: {**item["schema"], "description": item["description"]} for item in parameters}
        yield "Path" if parameters[0]["in"] == "path" else "Query", {"properties": fields}
    body = _json_schema(document, operation.get("requestBody", {}))
    if "anyOf" in body:
        for option in body["anyOf"]:
            yield f"Body: JSON, {option['title']}", option
    elif body:
        yield "Body: JSON", body


def _example(method: str, path: str) -> str:
    """Return a command for a shell; the page does not know the address that its reader used."""
    command = f"curl http://127.0.0.1:8000{path}"
    if method == "get" and path in _QUERIES:
        command = f"curl 'http://127.0.0.1:8000{path}?{urlencode(_QUERIES[path])}' --output images.png"
    elif method == "post" and path in _BODIES:
        shown = json.dumps(_BODIES[path])
        command += f" \\\n  -H 'Content-Type: application/json' \\\n  -d '{shown}'"
    elif method != "get":
        command += f" -X {method.upper()}"
    return f'<pre tabindex="0" role="region" aria-label="Example">{escape(command, quote=False)}</pre>\n'


def _table(document: Mapping[str, Any], caption: str, schema: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th><td>{escape(rule)}</td>'
        f"<td>{'' if default is None else f'<code>{escape(default)}</code>'}</td></tr>\n"
        for name, rule, default in _fields(document, schema)
    )
    caption = escape(caption)
    return (
        f'<h3>{caption}</h3>\n<div class="table" tabindex="0" role="region" aria-label="{caption}"><table>\n'
        '<thead><tr><th scope="col">field</th><th scope="col">rule</th><th scope="col">default</th></tr>'
        f"</thead>\n<tbody>\n{rows}</tbody></table></div>\n"
    )


def _fields(
    document: Mapping[str, Any], schema: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str | None]]:
    """Yield the name, the rule and the default (JSON, or None) of each field, those of nested objects too."""
    for name, field in schema["properties"].items():
        field = _resolved(document, field)
        of_list = field.get("type") == "array"
        inner = _resolved(document, field["items"]) if of_list and "items" in field else field
        rule = field.get("description", _types_of(field))
        yield f"{prefix}{name}", rule, json.dumps(field["default"]) if "default" in field else None
        if "properties" in inner:
            yield from _fields(document, inner, f"{prefix}{name}{'[]' if of_list else ''}.")


def _types_of(field: Mapping[str, Any]) -> str:
    types = [str(option.get("type", "")) for option in field.get("anyOf", [field])]
    return " or ".join(each for each in types if each)


def _json_schema(document: Mapping[str, Any], holder: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the JSON schema of a body or an answer; empty if it has none."""
    return _resolved(document, holder.get("content", {}).get("application/json", {}).get("schema", {}))


def _resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        found: Any = document
        for key in schema["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        schema = found
    return schema
