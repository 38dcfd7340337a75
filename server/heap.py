"""What the garbage collector need not look at: the modules and models that stay for as long as the server runs."""

from __future__ import annotations

import gc


def settle() -> None:
    """Collect garbage, then hide from the collector whatever is alive (`gc.freeze`).

    A parsed request is made of as many new lists as the client likes, and every so many of them the collector looks
    through all that is alive: with torch loaded 320,000 objects, a tenth of a second in which nothing else runs. That
    long takes this call, too; it belongs where models were just loaded.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def unsettle() -> None:
    """Show it everything again: at the end of a process, libraries count as leaked what was never collected."""
    gc.unfreeze()
