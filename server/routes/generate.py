"""POST /generate: the project's own interface to text models."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.http.checking import read_request
from server.http.sse import streamed
from server.request import Service, answered, start_request
from server.routes.openapi import ERRORS, body_schema, models_of, stream_content
from server.schemas.denoise import TextFrame
from server.schemas.text import GenerateResponse, text_request
from server.text.generate import text_recipe
from server.text.text_stream import stream_text

_STREAM = stream_content(("denoise", TextFrame), (None, GenerateResponse))


def router(service: Service) -> APIRouter:
    """Return the route of text.

    Args:
        service: the engine, its limits and the threads.
    """
    routes = APIRouter()
    request_types = {name: text_request(service.limits[name]) for name in models_of(service.engine, "text")}

    @routes.post(
        "/generate",
        summary="Generate text",
        response_model=GenerateResponse,
        responses={**ERRORS, 200: {"description": "The text", "content": _STREAM}},
        openapi_extra=body_schema(request_types),
        include_in_schema=bool(request_types),
    )
    async def post_generate(request: Request) -> Response:
        return await answered(service, request, answer_of(request))

    async def answer_of(request: Request) -> Response:
        queue, body = await read_request(service, "text", request_types, request)
        recipe = text_recipe(service, queue, body, request)
        running = await start_request(service, queue, request, recipe, followed=body.stream)
        if body.stream:
            return streamed(stream_text(running))
        answer = await running.answer()
        return Response(answer.model_dump_json(), media_type="application/json")

    return routes
