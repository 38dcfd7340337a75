"""Where the commands begin: Ctrl-C waits until torch is loaded, which would be left in pieces if it came between.

Importing torch takes seconds, catches exceptions inside, and may go on without numpy after a KeyboardInterrupt there.
"""

from __future__ import annotations

import importlib
import signal
import sys


def train() -> int:
    """`prime-train`."""
    return _run("training.train", "prime-train")


def evaluate() -> int:
    """`prime-eval`."""
    return _run("training.evaluate", "prime-eval")


def sample() -> int:
    """`prime-sample`."""
    return _run("training.sample", "prime-sample")


def _run(module: str, command: str) -> int:
    """Import a module and call its ``main``; 130 if Ctrl-C came before that."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        main = importlib.import_module(module).main
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    except KeyboardInterrupt:
        print(f"{command}: stopped before it began", file=sys.stderr)
        return 130
    return int(main())
