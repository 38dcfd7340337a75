"""From a parsed body to the model it is for, and to a checked request. No message repeats what the client sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError

from server.engine.model_queue import Kind, ModelQueue
from server.http.errors import ApiError
from server.schemas.base import ModelRequest, find_unknown_key

_ROUTES: dict[Kind, str] = {
    "text": "POST /generate and POST /v1/completions",
    "images": "POST /images and POST /v1/images/generations",
}
_NOUNS: dict[Kind, str] = {"text": "text", "images": "image"}

_Request = TypeVar("_Request", bound=ModelRequest)


def require_object(body: object) -> dict[str, object]:
    """Return a parsed body as a mapping.

    Raises:
        ApiError: 422 if it is none.
    """
    if not isinstance(body, dict):
        raise ApiError(422, "invalid_body", "the body must be a JSON object")
    return body


def choose_model(
    queues: Mapping[str, ModelQueue], kind: Kind, fields: Mapping[str, object], request: Request
) -> ModelQueue:
    """Return the model that a request names, or the first of its kind; note its name for the metrics.

    Args:
        queues: the loaded models.
        kind: what the route makes.
        fields: of the request; "model" may be missing or null.
        request: its state gets the name of the model.

    Raises:
        ApiError: 404 for a name that is not loaded, or if no model of the kind is; 422 for one of the other kind,
            or for what is no name.
    """
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
    request.state.model = queue.name
    return queue


def check_keys(kind: type[ModelRequest], fields: Mapping[str, object]) -> None:
    """Refuse unknown keys, before pydantic would describe each of a hundred thousand of them.

    Raises:
        ApiError: 422 for the first one.
    """
    message = find_unknown_key(kind.model_fields, fields, "the body")
    if message is not None:
        raise ApiError(422, "unknown_key", message)


def checked_request(model: type[_Request], fields: Mapping[str, object]) -> _Request:
    """Return the fields of a request, whose keys were checked, as a request.

    Raises:
        ApiError: 422 if a value breaks a rule; the message holds the rule.
    """
    malformed = model.find_malformed_field(fields)
    if malformed is not None:
        raise _invalid_value(model, malformed)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        param = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0]
        raise _invalid_value(model, str(param)) from None


def _invalid_value(model: type[ModelRequest], param: str) -> ApiError:
    rule = model.model_fields[param].description
    return ApiError(422, "invalid_value", f"{param} must be {rule}", param=param)
