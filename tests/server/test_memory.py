"""Out of memory, simulated: calls shrink, outputs stay the same, and the calls grow again (fault 22)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import server.engine.memory as memory
from server.engine.memory import RowCap, is_out_of_memory
from tests.server.running import NAME, Running, assert_error, serving, wait_until

BODY: dict[str, Any] = {"max_tokens": 12, "steps": 8, "seed": 4, "n": 8}
ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "python": MemoryError,
    "cpu": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    "cublas": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
}


@pytest.fixture
def server(model_path: Path) -> Iterator[Running]:
    with serving(model_path, max_batch_rows=8) as running:
        before = running.post(**BODY).json()["outputs"]
        yield running
        running.denoiser.hook = None
        wait_until(lambda: running.engine.held_rows == 0)
        assert running.post(**BODY).json()["outputs"] == before
        assert running.client.get("/ready").status_code == 200
        assert running.client.get("/health").status_code == 200


def room_for(num_rows: int, error: Callable[[], Exception] = MemoryError) -> Callable[[Sequence[int]], None]:
    def hook(lengths: Sequence[int]) -> None:
        if lengths.count(BODY["max_tokens"]) > num_rows:  # others only fill the call up
            raise error()

    return hook


@pytest.mark.parametrize("kind", ERRORS)
def test_fault_22_a_call_without_memory_is_made_again_with_half_the_rows(server: Running, kind: str) -> None:
    expected = server.post(**BODY).json()["outputs"]
    server.denoiser.hook = room_for(3, ERRORS[kind])
    server.denoiser.lengths.clear()
    assert server.post(**BODY).json()["outputs"] == expected
    assert [lengths.count(12) for lengths in server.denoiser.lengths[:4]] == [8, 4, 2, 2]
    assert server.metric("prime_out_of_memory_total") == 2
    server.denoiser.lengths.clear()
    assert server.post(**BODY).json()["outputs"] == expected  # the smaller cap is remembered
    assert max(lengths.count(12) for lengths in server.denoiser.lengths) == 2
    assert server.metric("prime_request_failure_total", reason="engine_error") == 0


def test_one_row_without_memory_fails_its_request_alone(server: Running) -> None:
    def no_room_for_long_rows(lengths: Sequence[int]) -> None:
        if 64 in lengths:
            raise MemoryError

    server.denoiser.hook = no_room_for_long_rows
    for _ in range(5):  # more often than a model may fault before it is given up
        assert_error(server.post(max_tokens=64, steps=2, n=2), 503, "out_of_memory")
        assert server.post(**BODY).status_code == 200
    assert server.metric("prime_request_failure_total", reason="out_of_memory") == 5
    assert server.metric("prime_model_up") == 1


def test_calls_grow_again(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PATIENCE_CALLS", 3)
    cap = server.engine.queues[NAME].batcher.cap = RowCap(8)
    server.denoiser.hook = room_for(3)
    assert server.post(**BODY).status_code == 200
    server.denoiser.hook = None
    for _ in range(3):
        assert server.post(**BODY).status_code == 200
    assert cap.now == 8


def test_a_cap_that_fails_again_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PATIENCE_CALLS", 2)
    cap = RowCap(16)
    cap.halve(16)
    cap.halve(8)
    for wait in (4, 8, 16):
        cap.succeeded(3)  # not full: it says nothing
        for _ in range(wait):
            assert cap.now == 4
            cap.succeeded(4)
        assert cap.now == 8
        cap.halve(8)
    cap.halve(1)
    assert cap.now == 1


def test_a_cap_is_half_of_the_call_that_failed_and_grows_no_further_than_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "PATIENCE_CALLS", 1)
    cap = RowCap(7)
    cap.halve(5)
    assert cap.now == 2
    for now in (4, 7, 7):
        cap.succeeded(cap.now)
        assert cap.now == now


def test_a_cap_waits_no_longer_than_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PATIENCE_CALLS", 2)
    monkeypatch.setattr(memory, "MAX_PATIENCE_CALLS", 3)
    cap = RowCap(16)
    for _ in range(4):
        cap.halve(4)
    for now in (2, 2, 4, 4, 4, 8):
        cap.succeeded(cap.now)
        assert cap.now == now


def test_a_failure_begins_the_wait_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PATIENCE_CALLS", 2)
    cap = RowCap(4)
    cap.halve(4)
    cap.succeeded(2)
    cap.halve(2)  # and twice as long, for it was the second
    for now in (1, 1, 1, 2):
        cap.succeeded(cap.now)
        assert cap.now == now


def test_other_errors_are_no_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))
