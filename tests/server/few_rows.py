"""A server with room for few rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.server.running import Running, serving, wait_until


@contextmanager
def serving_few_rows(model_path: Path) -> Iterator[Running]:
    """Serve with a queue of eight rows; a canary request must be answered alike at the end."""
    with serving(model_path, max_queue_rows=8, max_batch_rows=4, max_n=8) as running:
        canary: dict[str, Any] = {"prompt": "canary", "max_tokens": 5, "steps": 4, "seed": 9}
        before = running.post(**canary).json()["outputs"]
        threads = threading.active_count()
        yield running
        running.denoiser.hook = running.denoiser.broken_length = None
        wait_until(lambda: running.engine.held_rows == 0)
        assert running.post(**canary).json()["outputs"] == before
        assert running.engine.state == "ready"
        # The pool that prepares rows may have grown to its bound.
        assert threading.active_count() <= threads + 2
