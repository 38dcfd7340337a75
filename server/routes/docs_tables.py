"""Tables of GET /docs: what a JSON schema, a list of headers or the errors of an OpenAPI document say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with a heading; its cells are HTML, and the first of each row names it.

    Args:
        caption: text of the heading.
        columns: text of the head of each column.
        rows: of cells.
    """
    caption = escape(caption)
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
        for first, *cells in rows
    )
    return (
        f'<h3>{caption}</h3>\n<div class="table" tabindex="0" role="region" aria-label="{caption}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def table_of_fields(document: Mapping[str, Any], caption: str, schema: Mapping[str, Any]) -> str:
    """Return the table of the fields of a schema."""
    fields = list(_fields(document, schema))
    if all(default is None for _, _, default in fields):  # as in answers
        return table(caption, ("field", "meaning"), ((code(name), escape(rule)) for name, rule, _ in fields))
    rows = (
        (code(name), escape(rule), "" if default is None else code(default)) for name, rule, default in fields
    )
    return table(caption, ("field", "rule", "default"), rows)


def code(text: str) -> str:
    """Return a text as HTML that shows it as it is written."""
    return f"<code>{escape(text)}</code>"


def json_schema(document: Mapping[str, Any], holder: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the JSON schema of a body or an answer; empty if it has none."""
    return resolved(document, holder.get("content", {}).get("application/json", {}).get("schema", {}))


def resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a part of a document is, or refers to."""
    while "$ref" in schema:
        found: Any = document
        for key in schema["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        schema = found
    return schema


def _fields(
    document: Mapping[str, Any], schema: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str | None]]:
    """Yield the name, the rule and the default (JSON, or None) of each field, those of nested objects too."""
    for name, field in schema["properties"].items():
        field = resolved(document, field)
        of_list = field.get("type") == "array"
        inner = resolved(document, field["items"]) if of_list and "items" in field else field
        rule = field.get("description", _types_of(field))
        yield f"{prefix}{name}", rule, json.dumps(field["default"]) if "default" in field else None
        if "properties" in inner:
            yield from _fields(document, inner, f"{prefix}{name}{'[]' if of_list else ''}.")


def _types_of(field: Mapping[str, Any]) -> str:
    types = [str(option.get("type", "")) for option in field.get("anyOf", [field])]
    return " or ".join(each for each in types if each)
