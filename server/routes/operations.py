"""What operators ask: is it alive, is it ready, what is it, and how is it doing."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import torch
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.engine import Engine
from server.schemas import Limits, Status


def router(engine: Engine, limits: Limits) -> APIRouter:
    """Return the operational routes of an engine."""
    routes = APIRouter()
    info = describe(engine, limits)

    @routes.get("/health", response_model=Status, summary="The process answers")
    async def get_health() -> Response:
        return JSONResponse({"status": "ok"})

    @routes.get(
        "/ready", response_model=Status, summary="Requests are taken", responses={503: {"model": Status}}
    )
    async def get_ready() -> Response:
        state = engine.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @routes.get("/info", summary="What is loaded, and the limits of requests")
    async def get_info() -> dict[str, Any]:
        return info

    @routes.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def get_metrics() -> Response:
        return Response(engine.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    return routes


def describe(engine: Engine, limits: Limits) -> dict[str, Any]:
    """Return what /info says: the model, where it runs, versions and limits. No path of the machine."""
    name, checkpoint = engine.model
    config = checkpoint.config
    return {
        "model": name,
        "context": config.model.length,
        "num_parameters": sum(p.numel() for p in checkpoint.denoiser.parameters()),
        "network": config.model.model_dump(),
        "codec": {**config.codec.model_dump(), "base": config.codec.base},
        "schedule": config.schedule.model_dump(),
        "tokenizer": config.tokenizer.kind,
        "dtype": engine.dtype,
        "device": engine.device,
        "limits": {
            **dataclasses.asdict(limits),
            "max_batch_rows": engine.batcher.max_rows,
            "max_batch_tokens": engine.batcher.max_tokens,
            "max_queue_rows": engine.max_queue_rows,
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
