"""What a running server reads again: its API keys, when their file changes, and at SIGHUP keys and checkpoints.

A new checkpoint is loaded, checked and tried beside the one that serves; only then it takes its place, between two
calls, and the rows that began with the old weights finish with these. One that is damaged, or is another model than the
old one (only the weights may differ: requests were checked against everything else), changes nothing but the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from prime_core.checkpoint import Checkpoint
from server.engine.engine import Engine
from server.engine.model_queue import LoadedModel
from server.engine.warm_up import try_checkpoint
from server.heap import settle
from server.http.keys import KeyRing

logger = logging.getLogger("prime.server")

LOOK_EVERY_S = 1.0

LoadModel = Callable[[str], LoadedModel]


def ignore_early_hangups() -> None:
    """Let a SIGHUP do nothing, rather than end the process, while the models are read for the first time."""
    with contextlib.suppress(ValueError, AttributeError):  # not the main thread; no such signal here
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


class Reloader:
    """Reads again in a thread, so that a slow disk or a large model delays no request."""

    def __init__(self, keys: KeyRing, engine: Engine | None = None, load: LoadModel | None = None) -> None:
        """Note what is to be read again.

        Args:
            keys: with or without a file.
            engine: whose models are to be read again; None for keys only.
            load: reads the model of a name from where it came from, raising `ValueError` if it cannot.
        """
        self.keys = keys
        self._engine = engine
        self._load = load
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Read everything again soon, changed or not; call in the event loop."""
        self._asked.set()

    async def run(self) -> None:
        """Read again for as long as the server runs; ends by being cancelled."""
        # Only the main thread of a process may have handlers of signals.
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.ask)
        look_every_s = None if self.keys.file is None else LOOK_EVERY_S
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), look_every_s)
            asked = self._asked.is_set()
            self._asked.clear()
            await _in_daemon_thread(partial(self._read_again, asked))

    def _read_again(self, asked: bool) -> None:
        self.keys.refresh(force=asked)
        if asked and self._engine is not None and self._load is not None:
            for name in self._engine.queues:
                reload_model(self._engine, name, self._load)
            settle()


async def _in_daemon_thread(call: Callable[[], None]) -> None:
    """Run something in a thread that the end of the process does not wait for, as it would for a pool's."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            call()
        except Exception as error:
            logger.error("what was to be read again could not be", exc_info=error)
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="prime-reload", daemon=True).start()
    await done.wait()


def reload_model(engine: Engine, name: str, load: LoadModel) -> bool:
    """Read one model again and hand it to the engine; return whether it was taken.

    Args:
        engine: serves the model.
        name: of the model.
        load: reads it.
    """
    queue = engine.queues[name]
    try:
        model = load(name)
        difference = _difference(queue.checkpoint, model.checkpoint)
        if difference is not None:
            raise ValueError(f"its {difference} is not that of the model that serves; start the server again")
        if queue.failed:
            raise ValueError("the old one is out of service; start the server again")
        try_checkpoint(name, model.checkpoint)
    except Exception as error:  # noqa: BLE001  # whatever is wrong with the new one, the old one goes on
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        logger.error("model %r stays as it is: %s", name, reason)
        engine.metrics.reloads.labels(name, "refused").inc()
        return False
    queue.replace(model.checkpoint)
    engine.metrics.reloads.labels(name, "taken").inc()
    logger.info("model %r was read again; it serves from the next request on", name)
    return True


def _difference(old: Checkpoint, new: Checkpoint) -> str | None:
    """Return what of a new checkpoint but its weights is not as it was; None if all is."""
    parts: Sequence[tuple[str, object, object]] = (
        ("configuration", _configuration(old), _configuration(new)),
        ("number type", old.dtype, new.dtype),
        ("permutation of tokens", _listed(old), _listed(new)),
        ("tokenizer", _vocabulary(old), _vocabulary(new)),
    )
    return next((name for name, before, after in parts if before != after), None)


def _configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    return checkpoint.config.model_dump(exclude={"provenance"})


def _listed(checkpoint: Checkpoint) -> list[int] | None:
    permutation = checkpoint.codec.permutation
    return None if permutation is None else [int(token) for token in permutation]


def _vocabulary(checkpoint: Checkpoint) -> list[bytes] | None:
    tokenizer = checkpoint.tokenizer
    return None if tokenizer is None else [tokenizer.decode_bytes([t]) for t in range(tokenizer.vocab_size)]
