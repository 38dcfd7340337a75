"""POST /score: how likely a given text or image is under a model."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import APIRouter, Request, Response

from prime_core.config import UNetConfig
from server.engine.model_queue import Kind, ModelQueue
from server.http.checking import check_request, read_fields
from server.images.known import KnownShape
from server.request import Service, answered, start_request
from server.routes.openapi import ERRORS, body_schema
from server.schemas.base import Limits
from server.schemas.score import (
    ImageScoreRequest,
    ScoreResponse,
    TextScoreRequest,
    image_score_request,
    text_score_request,
)
from server.score import score_recipe

_FIELDS_OF_IMAGES = {"pixels", "png", "label"}
_FIELDS_OF_TEXT = {"text", "token_ids", "inputs"}


def router(service: Service) -> APIRouter:
    """Return the route of scores.

    Args:
        service: the engine, its limits and the threads.
    """
    routes = APIRouter()
    queues = service.engine.queues
    request_types = {name: _request_type(queue, service.limits[name]) for name, queue in queues.items()}

    @routes.post(
        "/score",
        summary="Score a given text or image: its likelihood bound, and the coded loss",
        response_model=ScoreResponse,
        responses=ERRORS,
        openapi_extra=body_schema(request_types),
    )
    async def post_score(request: Request) -> Response:
        return await answered(service, request, answer_of(request))

    async def answer_of(request: Request) -> Response:
        fields = await read_fields(service, request)
        queue, body = check_request(service, _kind_meant(queues, fields), request_types, fields, request)
        recipe = score_recipe(service, queue, body, request)
        answer = await (await start_request(service, queue, request, recipe)).answer()
        return Response(answer.model_dump_json(), media_type="application/json")

    return routes


def _kind_meant(queues: Mapping[str, ModelQueue], fields: Mapping[str, object]) -> Kind:
    """Return the kind of the model that is named, or else that the fields are for, or else of the first."""
    name = fields.get("model")
    if isinstance(name, str) and name in queues:
        return queues[name].kind
    if fields.keys() & _FIELDS_OF_TEXT:
        return "text"
    return "images" if fields.keys() & _FIELDS_OF_IMAGES else next(iter(queues.values())).kind


def _request_type(queue: ModelQueue, limits: Limits) -> type[TextScoreRequest] | type[ImageScoreRequest]:
    config = queue.checkpoint.config
    if not isinstance(config.model, UNetConfig):
        return text_score_request(limits)
    return image_score_request(KnownShape.of(config), config.model.num_choosable_labels, config.label_names)
