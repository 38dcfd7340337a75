"""POST /v1/completions: text models in OpenAI's shape."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.http.checking import read_request
from server.http.sampling_headers import SAMPLING_HEADERS, sampling_headers
from server.http.sse import streamed
from server.request import Service, answered, start_request
from server.routes.openapi import ERRORS, body_schema, models_of, stream_content
from server.schemas.completions import (
    Completion,
    CompletionChunkWithUsage,
    completion_request,
)
from server.text.completion_stream import stream_completion
from server.text.completions import completion_of, completion_recipe, origin_of

_STREAM = stream_content((None, CompletionChunkWithUsage))


def router(service: Service) -> APIRouter:
    """Return the route of completions.

    Args:
        service: the engine, its limits and the threads.
    """
    routes = APIRouter()
    request_types = {
        name: completion_request(service.limits[name]) for name in models_of(service.engine, "text")
    }

    @routes.post(
        "/v1/completions",
        summary="Generate text, in OpenAI's shape",
        response_model=Completion,
        responses={
            **ERRORS,
            200: {"description": "The text", "content": _STREAM, "headers": SAMPLING_HEADERS},
        },
        openapi_extra=body_schema(request_types),
        include_in_schema=bool(request_types),
    )
    async def post_completions(request: Request) -> Response:
        return await answered(service, request, answer_of(request))

    async def answer_of(request: Request) -> Response:
        queue, body = await read_request(service, "text", request_types, request)
        origin = origin_of(request, queue)
        recipe = completion_recipe(service, queue, body)
        running = await start_request(service, queue, request, recipe, followed=body.stream)
        headers = sampling_headers(running.prepared.rows)
        if body.stream:
            return streamed(stream_completion(running, body, origin), headers)
        completion = completion_of(origin, queue, body, running.prepared, await running.answer())
        return Response(completion.model_dump_json(), headers=headers, media_type="application/json")

    return routes
