"""GET /v1/models: the loaded models in OpenAI's shape. Nothing is looked up but the list of their names."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.engine.engine import Engine
from server.http.errors import ApiError
from server.routes.openapi import error_responses
from server.schemas.models import Model, ModelList

OWNER = "mdm-prime"
_NAME = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "the name of a loaded model",
    "schema": {"type": "string"},
}


def router(engine: Engine) -> APIRouter:
    """Return the routes of the list.

    Args:
        engine: holds the models, which were loaded just now.
    """
    routes = APIRouter()
    created = int(time.time())
    models = {name: Model(id=name, created=created, owned_by=OWNER) for name in engine.queues}
    all_models = ModelList(data=list(models.values()))

    @routes.get("/v1/models", summary="List the loaded models, in OpenAI's shape", response_model=ModelList)
    async def get_models() -> Response:
        return Response(all_models.model_dump_json(), media_type="application/json")

    # A path, because an unknown name with slashes is an unknown model too.
    @routes.get(
        "/v1/models/{name:path}",
        summary="Describe a loaded model, in OpenAI's shape",
        response_model=Model,
        responses=error_responses("model"),
        openapi_extra={"parameters": [_NAME]},
    )
    async def get_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in models:
            message = f"there is no such model; loaded: {', '.join(models)}"
            raise ApiError(404, "model_not_found", message, param="model")
        return Response(models[name].model_dump_json(), media_type="application/json")

    return routes
