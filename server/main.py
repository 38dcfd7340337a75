"""`prime-serve`: read the settings, load the models, build the engine and what is around it, listen, and serve."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import uvicorn

from prime_core.checkpoint import load_checkpoint
from prime_core.device import choose_device
from prime_core.models.graphs import cuda_graphs
from server.app import create_app, package_version
from server.command_line import load_settings
from server.engine.engine import Engine
from server.engine.model_queue import LoadedModel, ModelQueue
from server.fault_seam import add_faults
from server.heap import unsettle
from server.http.access import MAX_HEADER_BYTES
from server.http.keys import KeyRing, take_environment_keys
from server.http.protocol import DeadlineProtocol
from server.http.sites import is_loopback
from server.lifetime import ACCEPTED_AT_ONCE, Server, serve
from server.logs import configure_logs
from server.open_files import allow_files
from server.reload import Reloader, ignore_early_hangups
from server.settings import Settings, SettingsError

if TYPE_CHECKING:
    from server.http.tracing import Tracing

logger = logging.getLogger("prime.server")

# Once all rows are done, answers are on their way; a client that does not read them is cut off after this.
LAST_ANSWERS_S = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prime-serve`; return its exit status: 0 after a drain, 1 after a failure, 2 for bad settings.

    Args:
        argv: command line without the program's name; None for that of the process.
    """
    ignore_early_hangups()
    try:
        settings = load_settings(argv)
        configure_logs(settings.log_level, settings.log_format)
        keys = KeyRing(settings.api_keys_file, take_environment_keys())
        tracing = start_tracing(settings)
        engine = build_engine(settings)
        listener = _listen(settings)
    except (SettingsError, ValueError, OSError) as error:
        print(f"prime-serve: {error}", file=sys.stderr)
        return 2
    _warn_if_open(settings, keys)
    allowed = allow_files(settings.max_connections)
    config = http_config(engine, settings.model_copy(update={"max_connections": allowed}), keys, tracing)
    server = Server(config, engine, settings.drain_timeout_s, settings.stall_exit_s)
    reloader = Reloader(keys, engine, partial(load_model, settings))
    try:
        return asyncio.run(serve(server, listener, _banner(engine, listener), reloader))
    finally:
        unsettle()
        if tracing is not None:
            tracing.close()


def start_tracing(settings: Settings) -> Tracing | None:
    """Return where traces go; None, and nothing that sends any is imported, unless the settings ask for them.

    Raises:
        SettingsError: if its packages are not installed.
    """
    if settings.otlp_traces_endpoint is None:
        return None
    try:
        from server.http.tracing import Tracing
    except ImportError:
        raise SettingsError(
            "--otlp-traces-endpoint: traces need OpenTelemetry: pip install 'mdm-prime[otel]', or leave it out"
        ) from None
    return Tracing.to(settings.otlp_traces_endpoint, package_version())


def build_engine(settings: Settings) -> Engine:
    """Load the models and put an engine around them.

    Raises:
        ValueError: if a checkpoint or a setting does not fit; the message names it.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    models = [load_model(settings, name) for name, _ in settings.models]
    return Engine(
        models,
        max_batch_rows=settings.max_batch_rows,
        max_batch_tokens=settings.max_batch_tokens,
        max_queue_rows=settings.max_queue_rows,
        max_queue_bytes=settings.max_queue_bytes,
    )


def load_model(settings: Settings, name: str) -> LoadedModel:
    """Load one of the models that the settings name.

    Raises:
        ValueError: if its checkpoint or a setting does not fit; the message names it.
    """
    path = dict(settings.models)[name]
    device = choose_device(settings.device)
    try:
        graphs = cuda_graphs(settings.cuda_graphs, device) if settings.cuda_graphs else None
    except ValueError as error:
        raise SettingsError(f"--cuda-graphs (PRIME_CUDA_GRAPHS): {error}; leave it out, or 0") from None
    checkpoint = load_checkpoint(path, device=device, dtype=settings.dtype)
    checkpoint.denoiser.graphs = graphs  # of these weights alone: those that are read again get their own
    # For tests; of models that are read again too.
    (model,) = add_faults([LoadedModel(name, checkpoint)], os.environ)
    return model


def _warn_if_open(settings: Settings, keys: KeyRing) -> None:
    if not keys and not is_loopback(settings.host):
        logger.warning("anybody who reaches %s may send requests: no API key is set", settings.host)


def http_config(
    engine: Engine, settings: Settings, keys: KeyRing | None = None, tracing: Tracing | None = None
) -> uvicorn.Config:
    """Return how HTTP is spoken: h11 with bounded heads and deadlines, signals and logs left to us."""
    app = create_app(engine, settings, keys)
    return uvicorn.Config(
        app if tracing is None else tracing.around(app),
        http=DeadlineProtocol.with_bounds(
            settings.receive_timeout_s, settings.max_connections, engine.metrics.http
        ),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.ERROR,  # it warns of requests, which have a line of their own
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        backlog=ACCEPTED_AT_ONCE,
    )


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"--host, --port: cannot listen on {settings.host} port {settings.port}: {error.strerror}; "
            "choose another port, or 0 for any free one"
        ) from None
    return listener


def _banner(engine: Engine, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    models = "; ".join(_describe(queue) for queue in engine.queues.values())
    return f"prime-serve: http://{shown}:{port} is ready; {models}"


def _describe(queue: ModelQueue) -> str:
    size = sum(p.numel() for p in queue.checkpoint.denoiser.parameters())
    return f"model {queue.name}, {size / 1e6:.1f}M parameters, {queue.dtype} on {queue.device}"


if __name__ == "__main__":
    sys.exit(main())
