"""`prime-serve`: load the models, start the engine, listen, and end cleanly.

SIGTERM or Ctrl-C drains: /ready turns 503, new requests are refused, accepted ones finish, exit status 0.
A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch
import uvicorn

from prime_core.checkpoint import load_checkpoint
from prime_core.device import choose_device
from prime_core.models.graphs import cuda_graphs
from server.app import create_app, package_version
from server.engine.engine import Engine
from server.engine.model_queue import LoadedModel, ModelQueue
from server.fault_seam import add_faults
from server.heap import settle, unsettle
from server.http.access import MAX_HEADER_BYTES
from server.http.keys import KeyRing, take_environment_keys
from server.http.protocol import DeadlineProtocol
from server.logs import configure_logs
from server.open_files import allow_files
from server.reload import Reloader
from server.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from server.http.tracing import Tracing

logger = logging.getLogger("prime.server")

CHECK_EVERY_S = 0.1
# asyncio accepts so many connections before it looks at any of them, and as many again while it does; so this bounds
# how many there are for a moment beyond --max-connections.
ACCEPTED_AT_ONCE = 64
LISTEN_BACKLOG = 2048  # connections that wait in the kernel to be accepted
# Once all rows are done, answers are on their way; a client that does not read them is cut off after this.
LAST_ANSWERS_S = 10


class Server(uvicorn.Server):
    """uvicorn with our own ending: drain first, and leave when the engine is empty or dead.

    Attributes:
        status: exit status of the process.
    """

    def __init__(
        self, config: uvicorn.Config, engine: Engine, drain_timeout_s: float, stall_exit_s: float = 0.0
    ) -> None:
        super().__init__(config)
        self.engine = engine
        self.drain_timeout_s = drain_timeout_s
        self.stall_exit_s = stall_exit_s
        self._stalled_since_s: float | None = None
        self.status = 0
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; see `ACCEPTED_AT_ONCE` for why the queue of the kernel gets its length afterwards."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(LISTEN_BACKLOG)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note the first signal, on which `watch` acts (a handler must take no locks); leave at the second.

        The server writes no files, so nothing is lost by leaving but the answers that the user gave up.
        """
        self._signals += 1
        if self._signals > 1:
            os._exit(1)

    async def watch(self, banner: str) -> None:
        """Announce readiness, then wait for what ends the server: signals, or the engine's death."""
        announced = False
        drain_until_s: float | None = None
        while not self.should_exit:
            await asyncio.sleep(CHECK_EVERY_S)
            if not self.engine.alive:
                self._leave("the engine has stopped", status=1)
            elif self._hangs():
                self.engine.abandon()
                self._leave("the engine hangs", status=1)
            elif drain_until_s is not None:
                if self.engine.held_rows == 0:
                    self._leave("drained")
                elif time.monotonic() > drain_until_s:
                    self.engine.stop(timeout_s=0)
                    self._leave("drain timeout: accepted requests are dropped", status=1)
            elif self._signals == 1:
                self.engine.drain()
                logger.info("draining: %d rows are left", self.engine.held_rows)
                drain_until_s = time.monotonic() + self.drain_timeout_s
            elif not announced and self.engine.state == "ready":
                settle()
                _announce(banner)
                announced = True

    def _hangs(self) -> bool:
        """Whether the engine has been stalled for too long; nothing but a new process helps then."""
        now_s = time.monotonic()
        if not self.engine.stalled:
            if self._stalled_since_s is not None:
                logger.info("the engine goes on after %.1f s", now_s - self._stalled_since_s)
            self._stalled_since_s = None
            return False
        if self._stalled_since_s is None:
            logger.error("the engine hangs: /ready is 503 until it goes on")
            self._stalled_since_s = now_s
        return 0 < self.stall_exit_s < now_s - self._stalled_since_s

    def watch_ended(self, watcher: asyncio.Task[None]) -> None:
        """Done-callback of `watch`: a watcher that failed would leave a server that no signal can end."""
        if not watcher.cancelled() and (error := watcher.exception()) is not None:
            logger.error("the watcher of signals and engine has failed", exc_info=error)
            self._leave("nobody watches the engine", status=1)

    def _leave(self, why: str, status: int = 0) -> None:
        logger.info("%s", why)
        self.status = status
        self.should_exit = True


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prime-serve`; return its exit status: 0 after a drain, 1 after a failure, 2 for bad settings.

    Args:
        argv: command line without the program's name; None for that of the process.
    """
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
        return asyncio.run(_serve(server, listener, _banner(engine, listener), reloader))
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
    (model,) = add_faults(
        [LoadedModel(name, checkpoint)], os.environ
    )  # for tests; of models that are read again too
    return model


def _warn_if_open(settings: Settings, keys: KeyRing) -> None:
    if not keys and settings.host not in {"127.0.0.1", "::1", "localhost"}:
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
        log_level=logging.WARNING,
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


async def _serve(server: Server, listener: socket.socket, banner: str, reloader: Reloader) -> int:
    server.engine.start()
    reloading = asyncio.create_task(reloader.run())
    watcher = asyncio.create_task(server.watch(banner))
    watcher.add_done_callback(server.watch_ended)
    try:
        await server.serve(sockets=[listener])
        await asyncio.wait({watcher})  # its failure is told by `watch_ended`
    finally:
        watcher.cancel()
        reloading.cancel()
        server.engine.stop()
    return server.status


def _announce(banner: str) -> None:
    """Print the line that says where the server is; one that nobody can read is no reason to end."""
    try:
        print(banner, flush=True)
    except (OSError, ValueError) as error:  # ValueError: the stream was closed in this process
        logger.warning("stdout cannot be written (%s): %s", error, banner)
        # What is left in the buffer would fail again at exit, and turn the exit status into 120.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


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
