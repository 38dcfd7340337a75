"""POST /generate: the project's own interface to text models."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.http.body import read_json
from server.http.checking import check_keys, checked_request, choose_model, require_object
from server.http.sse import streamed
from server.request import Service, answered
from server.routes.openapi import ERRORS, body_schema, models_of, stream_content
from server.schemas.denoise import TextFrame
from server.schemas.text import GenerateRequest, GenerateResponse, text_request
from server.text.generate import generate
from server.text.text_stream import stream_text

_STREAM = stream_content(("denoise", TextFrame), (None, GenerateResponse))


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
        responses={**ERRORS, 200: {"description": "The text", "content": _STREAM}},
        openapi_extra=body_schema(kinds),
        include_in_schema=bool(kinds),
    )
    async def post_generate(request: Request) -> Response:
        return await answered(service, request, answer_of(request))

    async def answer_of(request: Request) -> Response:
        body = await read_json(request, service.max_body_bytes, service.receive_timeout_s)
        fields = require_object(body)
        check_keys(GenerateRequest, fields)
        queue = choose_model(service.engine.queues, "text", fields, request)
        asked = checked_request(kinds[queue.name], fields)
        if asked.stream:
            return streamed(await stream_text(service, queue, asked, request))
        answer = await generate(service, queue, asked, request)
        return Response(answer.model_dump_json(), media_type="application/json")

    return routes
