"""What a running server reads again: its API keys, when their file changes or at SIGHUP."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal

from server.keys import KeyRing

logger = logging.getLogger("prime.server")

LOOK_EVERY_S = 1.0


class Reloader:
    """Looks for new keys, in a thread, so that a slow disk delays no request."""

    def __init__(self, keys: KeyRing) -> None:
        """Note what is to be read again.

        Args:
            keys: with or without a file.
        """
        self.keys = keys
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Read everything again soon, changed or not; call in the event loop."""
        self._asked.set()

    async def run(self) -> None:
        """Read again for as long as the server runs; ends by being cancelled."""
        # Only the main thread of a process may have handlers of signals.
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.ask)
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), LOOK_EVERY_S)
            asked = self._asked.is_set()
            self._asked.clear()
            await asyncio.to_thread(self.keys.refresh, force=asked)
