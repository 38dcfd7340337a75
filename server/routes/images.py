"""POST /images, and GET /images for the address bar and <img>: the project's own interface to image models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from prime_core.labels import parse_label
from server.engine.model_queue import ModelQueue
from server.http.accept import preferred
from server.http.checking import check_request, read_request
from server.http.errors import ApiError
from server.http.query import read_query
from server.http.sampling_headers import SAMPLING_HEADERS
from server.http.sse import streamed
from server.images.image_stream import stream_images
from server.images.images import image_recipe
from server.images.known import KnownShape
from server.request import Service, answered, start_request
from server.routes.openapi import (
    ERRORS,
    QUERY_ERRORS,
    body_schema,
    models_of,
    query_schema,
    stream_content,
)
from server.schemas.base import Limits
from server.schemas.denoise import ImageFrame
from server.schemas.image_query import QUERY_FIELDS, image_query
from server.schemas.images import ImagesRequest, ImagesResponse, ResponseFormat, image_request

_TEXT_FIELDS = ("model", "preset", "label")

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_HEADERS: dict[str, dict[str, Any]] = {
    **SAMPLING_HEADERS,
    "X-Labels": {
        "schema": {"type": "string"},
        "description": "the label of each image in order, joined by commas; absent for a model without labels",
    },
}
_STREAM = stream_content(("denoise", ImageFrame), (None, ImagesResponse))
_OF_FILES_ONLY = "Not in JSON answers, which say it in their body: "


def router(service: Service) -> APIRouter:
    """Return the routes of images.

    Args:
        service: the engine, its limits and the threads.
    """
    routes = APIRouter()
    queues = {name: service.engine.queues[name] for name in models_of(service.engine, "images")}
    body_types = {name: _request_type(queue, service.limits[name]) for name, queue in queues.items()}
    query_types = {name: image_query(body_types[name], *_labels_of(queue)) for name, queue in queues.items()}

    @routes.post(
        "/images",
        summary="Generate images",
        response_model=ImagesResponse,
        description="JSON with PNG files, unless response_format, or the header Accept: image/png, asks for a file.",
        responses={**ERRORS, 200: _answers("image/png", "application/octet-stream", **_STREAM)},
        openapi_extra=body_schema(body_types),
        include_in_schema=bool(queues),
    )
    async def post_images(request: Request) -> Response:
        return await answered(service, request, _answer_to_body(service, body_types, request))

    @routes.get(
        "/images",
        summary="Generate images, as a picture for a browser",
        response_model=ImagesResponse,
        responses={**QUERY_ERRORS, 200: _answers("image/png")},
        description="One image, or a grid of them, as a PNG file; with the header Accept: application/json it is JSON.",
        openapi_extra=query_schema(query_types, QUERY_FIELDS),
        include_in_schema=bool(queues),
    )
    async def get_images(request: Request) -> Response:
        return await answered(service, request, _answer_to_query(service, query_types, request))

    return routes


async def _answer_to_body(
    service: Service, body_types: Mapping[str, type[ImagesRequest]], request: Request
) -> Response:
    queue, body = await read_request(service, "images", body_types, request)
    wants_picture = preferred(request.headers.get("accept")) == "image"
    return await _answer(service, queue, body, request, wants_picture=wants_picture)


async def _answer_to_query(
    service: Service, query_types: Mapping[str, type[ImagesRequest]], request: Request
) -> Response:
    fields = read_query(request.scope["query_string"], QUERY_FIELDS, _TEXT_FIELDS, ImagesRequest.model_fields)
    if isinstance(label := fields.get("label"), str):
        fields["label"] = parse_label(label)
    queue, body = check_request(service, "images", query_types, fields, request)
    wants_picture = preferred(request.headers.get("accept")) != "json"
    return await _answer(service, queue, body, request, wants_picture=wants_picture)


async def _answer(
    service: Service, queue: ModelQueue, body: ImagesRequest, request: Request, *, wants_picture: bool
) -> Response:
    response_format = _format_of(body, wants_picture)
    recipe = image_recipe(service, queue, body, response_format, request)
    running = await start_request(service, queue, request, recipe, followed=body.stream)
    if body.stream:
        return streamed(stream_images(running, body))
    answer = await running.answer()
    headers = {**answer.headers, "Vary": "Accept", "Cache-Control": "no-store"}
    return Response(answer.content, 200, headers, answer.media_type)


def _request_type(queue: ModelQueue, limits: Limits) -> type[ImagesRequest]:
    return image_request(limits, KnownShape.of(queue.checkpoint.config), *_labels_of(queue))


def _labels_of(queue: ModelQueue) -> tuple[int, tuple[str, ...]]:
    """Return how many labels of a model can be chosen, and their names."""
    config = queue.checkpoint.config
    return config.image_model.num_choosable_labels, config.label_names


def _format_of(body: ImagesRequest, wants_picture: bool) -> ResponseFormat:
    if body.stream:
        if body.response_format not in (None, "b64_json"):
            message = "response_format must be b64_json or null in a stream, which ends in JSON"
            raise ApiError(422, "invalid_value", message, param="response_format")
        return "b64_json"
    if body.response_format is not None:
        return body.response_format
    if not wants_picture:
        return "b64_json"
    return "png" if body.n == 1 else "grid"


def _answers(*media_types: str, **others: Any) -> dict[str, Any]:
    return {
        "description": "The images: JSON, or a file with its seed, cost and labels in the headers",
        "content": dict.fromkeys(media_types, _BINARY) | others,
        "headers": {
            name: {**header, "description": _OF_FILES_ONLY + header["description"], "required": False}
            for name, header in _HEADERS.items()
        },
    }
