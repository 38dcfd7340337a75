"""The parts of GET /docs that are about all routes: keys and headers, and errors."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from server.http.security import OPEN_PATHS
from server.routes.docs_examples import example, example_of_headers
from server.routes.docs_tables import code, resolved, table, table_of_fields

_PREFERRED = ("/generate", "/images")  # one of them is there


def common_section(document: Mapping[str, Any], base: str) -> str:
    """Return the section on keys and headers.

    Args:
        document: the OpenAPI document.
        base: address of the server, for the example.
    """
    components = document.get("components", {})
    schemes = components.get("securitySchemes", {})
    parts = ['<section aria-labelledby="every-request">\n<h2 id="every-request">Every request</h2>\n']
    if schemes:
        open_paths = " and ".join(code(path) for path in sorted(OPEN_PATHS))
        ways = "; or ".join(escape(scheme["description"]) for scheme in schemes.values())
        parts.append(f"<p>Every route but {open_paths} asks for {ways}.</p>\n")
    else:
        parts.append("<p>This server asks for no API key.</p>\n")
    if "description" in document["info"]:
        parts.append(f"<p>{escape(document['info']['description'])}</p>\n")
    parameters = components.get("parameters", {})
    rows = [
        (code(name), f"{escape(each['description'])}; {_routes_with(document, name)}")
        for name, each in parameters.items()
    ]
    parts.append(table("Headers of a request", ("header", "rule"), rows))
    headers = components.get("headers", {}).items()
    shown = [(code(name), escape(each["description"])) for name, each in headers]
    parts.append(table("Headers of an answer", ("header", "meaning"), shown))
    path = next((path for path in _PREFERRED if path in document["paths"]), None)
    if path is not None:
        parts.append(example(example_of_headers(base, path, with_key=bool(schemes))))
    return "".join(parts) + "</section>\n"


def errors_section(document: Mapping[str, Any]) -> str:
    """Return the section on errors: their shape, and every code."""
    schema = resolved(document, {"$ref": "#/components/schemas/ErrorBody"})
    rows = (
        (f"{code(str(each['status']))} {code(each['code'])}", escape(each["meaning"]))
        for each in document["x-errors"]
    )
    return (
        '<section aria-labelledby="errors">\n<h2 id="errors">Errors</h2>\n'
        "<p>Every error is JSON in one shape. In a stream that has begun it comes as <code>event: error</code>, under "
        "the status 200.</p>\n"
        f"{table_of_fields(document, 'Body of an error', schema)}"
        f"{table('Codes', ('status, code', 'meaning'), rows)}</section>\n"
    )


def _routes_with(document: Mapping[str, Any], parameter: str) -> str:
    """Return which routes take a parameter that is described once for all."""
    reference = {"$ref": f"#/components/parameters/{parameter}"}
    takes = {
        path: any(reference in operation.get("parameters", []) for operation in methods.values())
        for path, methods in document["paths"].items()
    }
    if all(takes.values()):
        return "for all routes"
    return f"for {', '.join(code(path) for path, does in takes.items() if does)}"
