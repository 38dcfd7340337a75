"""How many files the process may have open: every connection is one."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger("prime.server")

# Besides connections within the bound: those that were accepted and are about to be closed or refused, and what
# threads, libraries and checkpoints open.
SPARE_FILES = 512


def allow_files(num_connections: int) -> int:
    """Let the process have so many connections open, and return how many it may have.

    Without this the default of many systems, 1024, would be reached first, and then nobody could connect, not even to
    ask for /health. Where the system allows too few files, there are fewer connections, and a warning.

    Args:
        num_connections: most connections, at least 1.
    """
    needed = num_connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return num_connections
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == needed:
        return num_connections
    fewer = max(1, allowed - SPARE_FILES)
    logger.warning(
        "at most %d connections, as this process may have %d files open: for %d raise its limit to %d (ulimit -Hn)",
        fewer,
        allowed,
        num_connections,
        needed,
    )
    return fewer
