"""How routes that sample are described in /openapi.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from server.engine.engine import Engine
from server.engine.model_queue import Kind
from server.http.error_codes import Group, codes_of
from server.http.sse import MEDIA_TYPE
from server.schemas.base import ErrorBody, ModelRequest, inlined_schema


def error_responses(*groups: Group) -> dict[int | str, dict[str, Any]]:
    """Return the error answers of a route, each with its codes: those of any route, and of these groups."""
    return {
        status: {
            "model": ErrorBody,
            "description": "; ".join(f"{each.code}: {each.meaning}" for each in codes),
        }
        for status, codes in sorted(codes_of(("any", *groups)).items())
    }


SAMPLING_STATUS = "504"
"""No other route has this answer."""

ERRORS = error_responses("body", "fields", "model", "sampling")
QUERY_ERRORS = error_responses("query", "fields", "model", "sampling")


def stream_content(*events: tuple[str | None, type[BaseModel]]) -> dict[str, Any]:
    """Return the content of an answer that may also be a stream.

    OpenAPI 3.1 has no words for what the events of a stream hold; an extension, ``x-events``, lists them in order; one
    without a name is plain data.

    Args:
        events: kind of each event, None for plain data, and what its data holds.
    """
    shown: list[tuple[str | None, type[BaseModel]]] = [*events, ("error", ErrorBody)]
    lines = ", then ".join("data" if event is None else f"event: {event}" for event, _ in events)
    return {
        MEDIA_TYPE: {
            # Without a type: some readers take this for the schema of the whole text, others for that of each event.
            "schema": {
                "description": f"with stream: {lines}, then data: [DONE]; what fails on the way comes as event: error "
                "before it, under the status 200",
            },
            "x-events": [
                {"event": event, "schema": inlined_schema(data)}
                if event
                else {"schema": inlined_schema(data)}
                for event, data in shown
            ],
        }
    }


def models_of(engine: Engine, kind: Kind) -> list[str]:
    """Return the names of the models of a kind; the first answers requests that name none."""
    return [queue.name for queue in engine.queues.values() if queue.kind == kind]


def body_schema(request_types: Mapping[str, type[ModelRequest]]) -> dict[str, Any]:
    """Return the part of an operation that describes its body; empty if there is no model.

    Args:
        request_types: class of the request of each model; with more than one, the body is a request to any of them.
            The first of those with the same fields answers requests that name no model.
    """
    if not request_types:
        return {}
    schemas: list[dict[str, Any]] = []
    fields_seen: set[frozenset[str]] = set()
    for name, request_type in request_types.items():
        schema = inlined_schema(request_type)
        rule = schema["properties"]["model"]
        fields = frozenset(schema["properties"])
        first = fields not in fields_seen
        fields_seen.add(fields)
        schema["properties"]["model"] = {**_only(name, or_null=first), "description": rule["description"]}
        if first:
            schema["properties"]["model"]["default"] = None
        else:
            schema["required"] = [*schema.get("required", []), "model"]
        if len(request_types) > 1:
            schema["title"] += f" to model {name}"
        schemas.append(schema)
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _only(name: str, *, or_null: bool) -> dict[str, Any]:
    return {"anyOf": [{"type": "string", "const": name}, {"type": "null"}]} if or_null else {"const": name}


def query_schema(request_types: Mapping[str, type[ModelRequest]], names: Sequence[str]) -> dict[str, Any]:
    """Return the part of an operation that describes its query; empty if there is no model.

    Args:
        request_types: class of the query of each model; a field with rules of several models takes what any of them
            takes.
        names: of the fields that a query may hold.
    """
    if not request_types:
        return {}
    schemas = [inlined_schema(request_type)["properties"] for request_type in request_types.values()]
    parameters = []
    for name in names:
        options = [_given(schema[name]) for schema in schemas]
        options = [option for option in options if option.get("type") != "null"]  # never to be given
        options = [option for index, option in enumerate(options) if option not in options[:index]]
        if not options:
            continue
        schema = options[0] if len(options) == 1 else {"anyOf": options}
        if name == "model":
            schema = {"type": "string", "enum": list(request_types)}
        description = schemas[0][name]["description"]
        parameters.append({"name": name, "in": "query", "description": description, "schema": schema})
    return {"parameters": parameters}


def _given(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a field that is given: without the null that stands for one that is not."""
    kept = {key: value for key, value in schema.items() if key not in {"description", "title"}}
    if kept.get("default", ...) is None:
        del kept["default"]
    return kept
