"""How progress is shown: a bar on a terminal, and a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

LOG_EVERY_S = 30.0


class _Lines:
    """A log to which each redrawing of a bar is a line of its own."""

    def __init__(self, log: TextIO) -> None:
        self._log = log

    def write(self, text: str) -> None:
        """Write a drawn bar; what only returns to the start of a line is left out."""
        if line := text.strip("\r\n "):
            self._log.write(f"{line}\n")

    def flush(self) -> None:
        """Pass on."""
        self._log.flush()


def progress_bar(
    items: Iterable[Any] | None = None, *, shown: bool | None = True, **options: Any
) -> tqdm[Any]:
    """Return a bar on stderr: redrawn in place on a terminal, else a line at both ends and every 30 s between.

    Args:
        items: to iterate over; None for a bar that is updated by hand.
        shown: whether there is a bar; None for only on a terminal.
        **options: of `tqdm`.
    """
    is_terminal = sys.stderr.isatty()
    if not is_terminal:
        options |= {"file": _Lines(sys.stderr), "mininterval": LOG_EVERY_S, "maxinterval": LOG_EVERY_S}
    return tqdm(items, disable=not (is_terminal if shown is None else shown), **options)
