"""Fixtures that several tests of kernels share."""

from __future__ import annotations

import pytest

from kernels.backend import Backend


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every implementation; on a CPU Triton's interpreter, which takes a good part of a second for a few rows."""
    if request.param == "triton":
        pytest.importorskip("triton")
    chosen: Backend = request.param
    return chosen
