"""POST /generate: the project's own interface."""

from __future__ import annotations

from concurrent.futures import Executor

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from server.body import read_json
from server.engine import Engine
from server.errors import ApiError
from server.request import generate
from server.schemas import (
    ErrorBody,
    GenerateRequest,
    GenerateResponse,
    Limits,
    find_unknown_key,
    has_odd_part,
    inlined_schema,
    request_model,
)

_ERRORS = (400, 404, 408, 413, 415, 422, 429, 500, 503)


def router(engine: Engine, limits: Limits, receive_timeout_s: float, pool: Executor) -> APIRouter:
    """Return the native routes.

    Args:
        engine: runs the rows.
        limits: largest values of a request.
        receive_timeout_s: seconds in which a body must arrive.
        pool: threads for tokenization and plans.
    """
    routes = APIRouter()
    model = request_model(limits)
    content = {"application/json": {"schema": inlined_schema(model)}}

    @routes.post(
        "/generate",
        summary="Generate text",
        response_model=GenerateResponse,
        responses={status: {"model": ErrorBody} for status in _ERRORS},
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )
    async def post_generate(request: Request) -> Response:
        try:
            asked = await _read(request, model, engine.model.name, limits, receive_timeout_s)
            answer = await generate(engine, asked, limits, pool, request)
        except ApiError as error:
            if error.status < 500 and error.status != 429:
                engine.metrics.reject("invalid")
            raise
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        return Response(answer.model_dump_json(), media_type="application/json")

    return routes


async def _read(
    request: Request, model: type[GenerateRequest], name: str, limits: Limits, timeout_s: float
) -> GenerateRequest:
    """Return the checked body."""
    asked = checked_request(model, await read_json(request, limits.max_body_bytes, timeout_s))
    if asked.model is not None and asked.model != name:
        raise ApiError(404, "model_not_found", f"there is no such model; loaded: {name}", param="model")
    return asked


def checked_request(model: type[GenerateRequest], body: object) -> GenerateRequest:
    """Return a parsed body as a request.

    Raises:
        ApiError: 422 for a body that is not one; the message holds the rule that it breaks.
    """
    if not isinstance(body, dict):
        raise ApiError(422, "invalid_body", "the body must be a JSON object")
    # Before pydantic, which would describe each of a hundred thousand unknown keys.
    message = find_unknown_key(model, body)
    if message is not None:
        raise ApiError(422, "unknown_key", message)
    if has_odd_part(body.get("template")):  # for the same reason
        raise _invalid_value(model, "template")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        param = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0]
        raise _invalid_value(model, str(param)) from None


def _invalid_value(model: type[GenerateRequest], param: str) -> ApiError:
    rule = model.model_fields[param].description
    return ApiError(422, "invalid_value", f"{param} must be {rule}", param=param)
