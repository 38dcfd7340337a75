"""How long a server serves: from its engine's start until a signal, or the engine's death, ends it cleanly.

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
from pathlib import Path
from types import FrameType

import uvicorn

from server.engine.engine import Engine
from server.heap import settle
from server.reload import Reloader

logger = logging.getLogger("prime.server")

CHECK_EVERY_S = 0.1
# asyncio accepts so many connections before it looks at any of them, and as many again while it does; so this bounds
# how many there are for a moment beyond --max-connections.
ACCEPTED_AT_ONCE = 64
LISTEN_BACKLOG = 2048  # connections that wait in the kernel to be accepted


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
                logger.info("the engine goes on, %.1f s after this was seen", now_s - self._stalled_since_s)
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


async def serve(server: Server, listener: socket.socket, banner: str, reloader: Reloader) -> int:
    """Serve until something ends it, and return the exit status of the process.

    Args:
        server: how HTTP is spoken, around an engine that was not started.
        listener: is bound.
        banner: the line that says that the server is ready.
        reloader: reads again what changes.
    """
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
