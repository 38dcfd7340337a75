"""POST /v1/images/generations: image models in OpenAI's shape."""

from __future__ import annotations

import time
from functools import partial

from fastapi import APIRouter, Request, Response

from prime_core.config import UNetConfig
from server.engine.model_queue import ModelQueue
from server.http.body import read_json
from server.http.checking import check_keys, checked_request, choose_model, require_object
from server.http.sampling_headers import SAMPLING_HEADERS, sampling_headers
from server.http.sse import streamed
from server.images.generation_stream import generation_frames
from server.images.generations import generation_of, image_answers, size_of, start_generation
from server.images.images import count
from server.request import Service, answered
from server.routes.openapi import ERRORS, body_schema, models_of, stream_content
from server.schemas.base import Limits
from server.schemas.generations import (
    CompletedImageEvent,
    Generation,
    GenerationRequest,
    PartialImageEvent,
    generation_request,
)
from server.schemas.openai import without_nulls

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
    kinds = {name: _request_kind(queue, service.limits[name]) for name, queue in queues.items()}

    @routes.post(
        "/v1/images/generations",
        summary="Generate images, in OpenAI's shape",
        response_model=Generation,
        responses={
            **ERRORS,
            200: {"description": "The images", "content": _STREAM, "headers": SAMPLING_HEADERS},
        },
        openapi_extra=body_schema(kinds),
        include_in_schema=bool(kinds),
    )
    async def post_generations(request: Request) -> Response:
        return await answered(service, request, answer_of(request))

    async def answer_of(request: Request) -> Response:
        created = int(time.time())
        body = await read_json(request, service.max_body_bytes, service.receive_timeout_s)
        fields = require_object(body)
        check_keys(GenerationRequest, fields)
        queue = choose_model(service.engine.queues, "images", fields, request)
        asked = checked_request(kinds[queue.name], without_nulls(fields))
        running = await start_generation(service, queue, asked, request)
        headers = sampling_headers(running.prepared.rows)
        if asked.stream:
            return streamed(generation_frames(running, queue, asked.partial_images, created), headers)
        answer = await running.answer(partial(image_answers, queue))
        rows = [(image.nfe, image.steps_skipped) for image in answer.images]
        count(service.engine.metrics, queue.name, answer.timings, rows)
        generation = generation_of(created, queue, answer)
        return Response(generation.model_dump_json(), headers=headers, media_type="application/json")

    return routes


def _request_kind(queue: ModelQueue, limits: Limits) -> type[GenerationRequest]:
    config = queue.checkpoint.config
    assert isinstance(config.model, UNetConfig), "an image model"
    num_labels = config.model.num_labels if config.model.labels == "class" else 0
    return generation_request(limits, size_of(queue.checkpoint), num_labels, config.label_names)
