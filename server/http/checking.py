"""From what a client sent to the model it is for, and to a checked request. No message repeats what was sent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError

from server.engine.model_queue import Kind, ModelQueue
from server.http.errors import ApiError
from server.http.json_text import ODD_NUMBERS
from server.request import Service
from server.schemas.base import ModelRequest, find_unknown_key
from server.schemas.openai import without_nulls

_ROUTES: dict[Kind, str] = {
    "text": "POST /generate, POST /score and POST /v1/completions",
    "images": "POST /images, POST /score and POST /v1/images/generations",
}
_NOUNS: dict[Kind, str] = {"text": "text", "images": "image"}

_Request = TypeVar("_Request", bound=ModelRequest)


async def read_request(
    service: Service, kind: Kind, request_types: Mapping[str, type[_Request]], request: Request
) -> tuple[ModelQueue, _Request]:
    """Read a body, and return the model that it is for and the request that it holds.

    Args:
        service: the models, and the reader of bodies.
        kind: what the route makes.
        request_types: class of the request of each model of that kind.
        request: the HTTP request; its body must not have been read.

    Raises:
        ApiError: see `read_fields` and `check_request`.
        ClientDisconnect: if the client went away.
    """
    fields = await read_fields(service, request)
    return check_request(service, kind, request_types, fields, request)


async def read_fields(service: Service, request: Request) -> dict[str, object]:
    """Return the fields of a JSON body, unchecked.

    Raises:
        ApiError: see `Bodies.read_json`; 422 if the body is no object.
        ClientDisconnect: if the client went away.
    """
    body = await service.bodies.read_json(request)
    if not isinstance(body, dict):
        raise ApiError(422, "invalid_body", "the body must be a JSON object")
    return body


def check_request(
    service: Service,
    kind: Kind,
    request_types: Mapping[str, type[_Request]],
    fields: Mapping[str, object],
    request: Request,
) -> tuple[ModelQueue, _Request]:
    """Return the model that fields are for, and the request that they hold.

    Args:
        service: the models.
        kind: what the route makes.
        request_types: class of the request of each model of that kind.
        fields: of a body or of a query.
        request: its state gets the name of the model, for the metrics.

    Raises:
        ApiError: 404 if there is no such model, 422 for a model of the other kind, an unknown key or a value that
            breaks a rule.
    """
    queue = _choose_model(service.engine.queues, kind, fields)
    request.state.model = queue.name
    request_type = request_types[queue.name]
    # Before pydantic would describe each of a hundred thousand unknown keys.
    message = find_unknown_key(request_type.model_fields, fields, "the body")
    if message is not None:
        raise ApiError(422, "unknown_key", message)
    return queue, checked_request(request_type, fields)


def _choose_model(queues: Mapping[str, ModelQueue], kind: Kind, fields: Mapping[str, object]) -> ModelQueue:
    """Return the model that a request names ("model" may be missing or null), or the first of its kind."""
    name = fields.get("model")
    loaded = ", ".join(queues)
    if name is None:
        name = next((queue.name for queue in queues.values() if queue.kind == kind), None)
        if name is None:
            message = f"no {_NOUNS[kind]} model is loaded; loaded: {loaded}"
            raise ApiError(404, "model_not_found", message, param="model")
    if not isinstance(name, str):
        message = "model must be the name of a loaded model, or null"
        raise ApiError(422, "invalid_value", message, param="model")
    queue = queues.get(name)
    if queue is None:
        raise ApiError(404, "model_not_found", f"there is no such model; loaded: {loaded}", param="model")
    if queue.kind != kind:
        message = f"model must be the name of a model of this route; that one answers {_ROUTES[queue.kind]}"
        raise ApiError(422, "wrong_route", message, param="model")
    return queue


def checked_request(request_type: type[_Request], fields: Mapping[str, object]) -> _Request:
    """Return the fields of a request, whose keys were checked, as a request.

    Raises:
        ApiError: 422 if a value breaks a rule; the message holds the rule.
    """
    if request_type.nulls_are_defaults:
        fields = without_nulls(fields)
    malformed = request_type.find_malformed_field(fields)
    if malformed is not None:
        raise _invalid_value(request_type, malformed, fields)
    try:
        return request_type.model_validate(fields)
    except ValidationError as error:
        param = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0]
        raise _invalid_value(request_type, str(param), fields) from None


def _invalid_value(request_type: type[ModelRequest], param: str, fields: Mapping[str, object]) -> ApiError:
    message = f"{param} must be {request_type.model_fields[param].description}"
    value = fields.get(param)
    if isinstance(value, float) and math.isnan(value):  # the rule alone would let minus zero pass
        message += f"; {ODD_NUMBERS} are not taken for numbers"
    return ApiError(422, "invalid_value", message, param=param)
