"""POST /v1/images/generations: image models in OpenAI's shape."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from server.engine.model_queue import ModelQueue
from server.http.checking import read_request
from server.http.sampling_headers import SAMPLING_HEADERS, sampling_headers
from server.http.sse import streamed
from server.images.generation_stream import stream_generation
from server.images.generations import generation_of, generation_recipe, size_of
from server.request import Service, answered, start_request
from server.routes.openapi import ERRORS, body_schema, models_of, stream_content
from server.schemas.base import Limits
from server.schemas.generations import (
    CompletedImageEvent,
    Generation,
    GenerationRequest,
    PartialImageEvent,
    generation_request,
)

_STREAM = stream_content(
    ("image_generation.partial_image", PartialImageEvent),
    ("image_generation.completed", CompletedImageEvent),
)


def router(service: Service) -> APIRouter:
    """Return the route of image generations.

    Args:
        service: the engine, its limits and the threads.
    """
    routes = APIRouter()
    queues = {name: service.engine.queues[name] for name in models_of(service.engine, "images")}
    request_types = {name: _request_type(queue, service.limits[name]) for name, queue in queues.items()}

    @routes.post(
        "/v1/images/generations",
        summary="Generate images, in OpenAI's shape",
        response_model=Generation,
        responses={
            **ERRORS,
            200: {"description": "The images", "content": _STREAM, "headers": SAMPLING_HEADERS},
        },
        openapi_extra=body_schema(request_types),
        include_in_schema=bool(request_types),
    )
    async def post_generations(request: Request) -> Response:
        return await answered(service, request, answer_of(request))

    async def answer_of(request: Request) -> Response:
        created = int(time.time())
        queue, body = await read_request(service, "images", request_types, request)
        recipe = generation_recipe(service, queue, body)
        running = await start_request(service, queue, request, recipe, followed=body.stream)
        headers = sampling_headers(running.prepared.rows)
        if body.stream:
            return streamed(stream_generation(running, body.partial_images, created), headers)
        generation = generation_of(created, queue, await running.answer())
        return Response(generation.model_dump_json(), headers=headers, media_type="application/json")

    return routes


def _request_type(queue: ModelQueue, limits: Limits) -> type[GenerationRequest]:
    config = queue.checkpoint.config
    num_labels = config.image_model.num_choosable_labels
    return generation_request(limits, size_of(queue.checkpoint), num_labels, config.label_names)
