"""The FastAPI application: routes and error handlers around an engine that is given to it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from prime_core.checkpoint import Checkpoint
from prime_core.tokenizer import Tokenizer
from server.engine.engine import Engine
from server.http.access import AccessMiddleware
from server.http.body import Bodies
from server.http.crowd import RefuseCrowds
from server.http.errors import install_error_handlers
from server.http.head import AnswerHead
from server.http.keys import KeyRing
from server.http.leaving import CancelUnfinished
from server.http.route_table import route_table
from server.http.security import RequireKey
from server.http.sites import RefuseOtherSites
from server.http.target import OriginForm
from server.request import Service
from server.routes import completions, generate, generations, images, models, operations, playground, score
from server.routes.docs_page import docs_router
from server.routes.document import complete_document
from server.schemas.base import Limits
from server.settings import Settings
from server.workers import Workers


def create_app(engine: Engine, settings: Settings, keys: KeyRing | None = None) -> FastAPI:
    """Return the application in front of an engine, which the caller starts and stops.

    Args:
        engine: runs the rows.
        settings: limits of requests and bodies.
        keys: who may send requests; None or no keys for everybody.
    """
    app = FastAPI(
        title="MDM-Prime",
        version=package_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect is no answer in our shape, and loses a body
    )
    limits = {name: limits_of(queue.checkpoint, settings) for name, queue in engine.queues.items()}
    service = Service(
        engine,
        limits,
        Workers(engine.queues),
        Bodies(
            settings.max_body_bytes, settings.max_held_body_bytes, settings.receive_timeout_s, engine.metrics
        ),
        settings.max_request_s,
    )
    app.include_router(generate.router(service))
    app.include_router(images.router(service))
    app.include_router(score.router(service))
    app.include_router(completions.router(service))
    app.include_router(generations.router(service))
    app.include_router(models.router(engine))
    app.include_router(operations.router(engine, limits))
    app.include_router(docs_router(app.openapi))
    app.include_router(playground.router())
    install_error_handlers(app)
    app.add_middleware(AnswerHead)
    app.add_middleware(CancelUnfinished, metrics=engine.metrics)
    app.add_middleware(RefuseCrowds, max_requests=settings.max_connections, metrics=engine.metrics)
    keys = KeyRing() if keys is None else keys
    app.add_middleware(RefuseOtherSites, host=settings.host, allowed_hosts=settings.allowed_hosts, keys=keys)
    app.add_middleware(RequireKey, keys=keys)
    routes = {path for _, path in route_table(app)}
    # Around all others but the last: a refusal has an id and a line in the log too.
    app.add_middleware(AccessMiddleware, metrics=engine.metrics.http, routes=routes)
    app.add_middleware(OriginForm)
    # FastAPI keeps the document that it makes here, when all routes are there.
    complete_document(
        app.openapi(),
        settings.max_request_s,
        with_keys=bool(keys),
        with_traces=settings.otlp_traces_endpoint is not None,
    )
    return app


def limits_of(checkpoint: Checkpoint, settings: Settings) -> Limits:
    """Return the largest values that a request to a model may hold."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    return Limits(
        context=config.model.length,
        vocab_size=config.codec.vocab_size,
        max_n=settings.max_n,
        max_steps=settings.max_steps,
        max_work=settings.max_work,
        max_body_bytes=settings.max_body_bytes,
        max_chars=None if tokenizer is None else config.model.length * _longest_token_bytes(tokenizer),
    )


def _longest_token_bytes(tokenizer: Tokenizer) -> int:
    return max(len(tokenizer.decode_bytes([token])) for token in range(tokenizer.vocab_size))


def package_version() -> str:
    """Return the version of the installed distribution, or "0" in a source tree that is not installed."""
    try:
        return version("mdm-prime")
    except PackageNotFoundError:
        return "0"
