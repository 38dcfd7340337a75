"""What operators ask: is it alive, is it ready, what is it, and how is it doing."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from prime_core.config import UNetConfig
from prime_core.pixels import PixelCodec, top_pixel
from prime_core.sampling.correctors import MAX_CORRECTOR_SCALE
from prime_core.sampling.curves import MAX_POWER, MAX_TEMPERATURE
from prime_core.sampling.presets import PRESETS
from server.engine.engine import Engine
from server.engine.model_queue import ModelQueue
from server.schemas.base import Limits, Status
from server.schemas.score import MAX_SAMPLES
from server.schemas.text import MAX_STOP_CHARS, MAX_STOPS, MAX_TEMPLATE_PARTS

_TEXT = {"schema": {"type": "string", "description": "Prometheus' text format"}}


def router(engine: Engine, limits: Mapping[str, Limits]) -> APIRouter:
    """Return the operational routes of an engine.

    Args:
        engine: what is asked about.
        limits: largest values of a request, by the name of the model.
    """
    routes = APIRouter()
    models = {name: describe_model(queue, limits[name]) for name, queue in engine.queues.items()}
    process = describe_process(engine, next(iter(limits.values())))

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
        shown = [{**models[name], "in_service": not queue.failed} for name, queue in engine.queues.items()]
        return {"models": shown, **process}

    @routes.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"description": "The metrics", "content": {"text/plain": _TEXT}}},
    )
    async def get_metrics() -> Response:
        return Response(engine.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    return routes


def describe_model(queue: ModelQueue, limits: Limits) -> dict[str, Any]:
    """Return what /info says of one model. No path of the machine."""
    checkpoint = queue.checkpoint
    config = checkpoint.config
    described = {
        "name": queue.name,
        "kind": queue.kind,
        "num_parameters": sum(p.numel() for p in checkpoint.denoiser.parameters()),
        "network": config.model.model_dump(),
        "codec": {**config.codec.model_dump(), "base": config.codec.base},
        "schedule": config.schedule.model_dump(),
        "dtype": queue.dtype,
        "device": queue.device,
        "limits": {"context": limits.context, "vocab_size": limits.vocab_size, "max_chars": limits.max_chars},
    }
    if not isinstance(config.model, UNetConfig):
        return {**described, "tokenizer": config.tokenizer.kind}
    return {
        **described,
        "picture_shape": PixelCodec(config.model).picture_shape,
        "labels": config.model.labels,
        "top_pixel": top_pixel(config.codec.vocab_size),
        "num_labels": config.model.num_choosable_labels,
        "label_names": config.label_names,
        "presets": {
            name: {"steps": preset.steps, "published_fid": preset.published_fid, "note": preset.note}
            for name, preset in PRESETS.items()
        },
    }


def describe_process(engine: Engine, limits: Limits) -> dict[str, Any]:
    """Return what /info says of the process: limits that all models share, and versions."""
    return {
        "limits": {
            "max_n": limits.max_n,
            "max_steps": limits.max_steps,
            "max_temperature": MAX_TEMPERATURE,
            "max_corrector_scale": MAX_CORRECTOR_SCALE,
            "max_corrector_power": MAX_POWER,
            "max_stops": MAX_STOPS,
            "max_stop_chars": MAX_STOP_CHARS,
            "max_template_parts": MAX_TEMPLATE_PARTS,
            "max_samples": MAX_SAMPLES,
            "max_work": limits.max_work,
            "max_body_bytes": limits.max_body_bytes,
            "max_batch_rows": engine.max_batch_rows,
            "max_batch_tokens": engine.max_batch_tokens,
            "max_queue_rows": engine.max_queue_rows,
            "max_queue_bytes": engine.max_queue_bytes,
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
