"""Fixtures that several tests of networks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other in hundreds of tiny calls take minutes on a busy machine."""
    # Here, as not all of these tests need the packages of the benchmarks.
    from benchmarks.settings import computing_threads

    with computing_threads(1):
        yield
