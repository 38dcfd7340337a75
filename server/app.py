"""The FastAPI application: routes and error handlers around an engine that is given to it."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prime_core.checkpoint import Checkpoint
from prime_core.tokenizer import Tokenizer
from server.docs_page import docs_router
from server.engine import Engine
from server.errors import ApiError, install_error_handlers, internal_error, new_request_id
from server.keys import KeyRing
from server.request import Service
from server.routes import images, native, operations
from server.schemas.base import Limits
from server.security import RequireKey
from server.settings import Settings

access_log = logging.getLogger("prime.access")

# Tokenization and plans are short and mostly one-threaded; more threads would only compete with the engine.
PREPARE_THREADS = 2
# uvicorn bounds a head only while it is incomplete, so one that arrives in a single read may be larger.
MAX_HEADER_BYTES = 2**16


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
    pool = ThreadPoolExecutor(PREPARE_THREADS, thread_name_prefix="prime-prepare")
    service = Service(
        engine, limits, pool, settings.receive_timeout_s, settings.max_body_bytes, settings.max_request_s
    )
    app.include_router(native.router(service))
    app.include_router(images.router(service))
    app.include_router(operations.router(engine, limits))
    app.include_router(docs_router(app.openapi))
    install_error_handlers(app)
    app.add_middleware(RequireKey, keys=KeyRing() if keys is None else keys)
    app.add_middleware(RequestId)  # outermost: a refusal has an id and a line in the log too
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


class RequestId:
    """Bounds the head; gives each request an id (header X-Request-Id) and one line in the log.

    Exceptions that nobody expected are answered here: further out, their answers would carry no id.
    The line holds nothing that a client can choose: neither path nor query, only the route that matched.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope.setdefault("state", {})["request_id"] = new_request_id()
        started_s = time.monotonic()
        status = 0

        app = _headers_too_large if _head_bytes(scope) > MAX_HEADER_BYTES else self.app

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await app(scope, receive, send_with_id)
        except Exception as error:
            answer = internal_error(request_id, error)
            if status:
                raise  # half an answer is out: uvicorn closes the connection, so that it cannot pass for whole
            await answer.response()(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "-")
            elapsed_ms = 1000 * (time.monotonic() - started_s)
            access_log.info("%s %s %d %.1f ms", request_id, route, status, elapsed_ms)


def _head_bytes(scope: Scope) -> int:
    fields = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return len(scope["raw_path"]) + len(scope["query_string"]) + fields


async def _headers_too_large(scope: Scope, receive: Receive, send: Send) -> None:
    error = ApiError(
        431,
        "headers_too_large",
        f"the head of the request is over {MAX_HEADER_BYTES} bytes",
        headers={"Connection": "close"},
    )
    await error.response()(scope, receive, send)
