"""POST /generate: the project's own interface to text models."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.http.body import read_json
from server.http.checking import check_keys, checked_request, choose_model, require_object
from server.http.sse import streamed
from server.request import Service, answered
from server.routes.openapi import ERRORS, STREAM, body_schema, models_of
from server.schemas.text import GenerateRequest, GenerateResponse, text_request
from server.text.generate import generate
from server.text.text_stream import stream_text


def router(service: Service) -> APIRouter:
    """Return the route of text.

    Args:
        service: the engine, its limits and the threads.
    """
    routes = APIRouter()
    kinds = {name: text_request(service.limits[name]) for name in models_of(service.engine, "text")}

    @routes.post(
        "/generate",
        summary="Generate text",
        response_model=GenerateResponse,
        responses={**ERRORS, 200: {"description": "The text", "content": STREAM}},
        openapi_extra=body_schema(kinds),
        include_in_schema=bool(kinds),
    )
    async def post_generate(request: Request) -> Response:
        return await answered(service, request, answer_of(request))

    async def answer_of(request: Request) -> Response:
        fields = require_object(await read_json(request, service.max_body_bytes, service.receive_timeout_s))
        check_keys(GenerateRequest, fields)
        queue = choose_model(service.engine.queues, "text", fields, request)
        body = checked_request(kinds[queue.name], fields)
        if body.stream:
            return streamed(await stream_text(service, queue, body, request))
        answer = await generate(service, queue, body, request)
        return Response(answer.model_dump_json(), media_type="application/json")

    return routes
