"""Fixtures that several tests of networks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prime_core.models.unet import UNet
from tests.prime_core.small_unet import make_network


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other in hundreds of tiny calls take minutes on a busy machine."""
    # Here, as not all of these tests need the packages of the benchmarks.
    from benchmarks.settings import computing_threads

    with computing_threads(1):
        yield


@pytest.fixture(scope="module")
def network() -> UNet:
    """A small image network without labels or times."""
    return make_network().requires_grad_(False)
