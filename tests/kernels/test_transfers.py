"""Copies between host and device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.transfers import HostCopy, queued
from tests.pretend_gpu import GPU, pretend_gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
only_pretended = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not tell what waits for it")


def test_numbers_arrive() -> None:
    copy = HostCopy(torch.tensor([3, 40], device=DEVICE))
    assert copy.wait().tolist() == copy.wait().tolist() == [3, 40]
    assert queued(torch.tensor([3, 40]), DEVICE).tolist() == [3, 40]


def test_nothing_is_copied_where_it_is_already() -> None:
    here = torch.ones(2)
    assert HostCopy(here).wait() is here
    assert queued(here, torch.device("cpu")) is here


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what is queued runs later on a GPU alone")
def test_what_is_queued_is_what_was_given() -> None:
    given = torch.arange(1 << 16)
    torch.zeros(1 << 28, device=DEVICE)  # something to do
    there = queued(given, DEVICE)
    given.zero_()
    back = HostCopy(there)
    there.zero_()
    assert torch.equal(back.wait(), torch.arange(1 << 16))


@only_pretended
@pytest.mark.parametrize("empty", [torch.zeros(0, 3), torch.zeros(3)], ids=["empty", "filled"])
def test_only_the_way_back_is_waited_for_and_only_when_asked(empty: Tensor) -> None:
    pytest.importorskip("triton")
    with pretend_gpu() as waits:
        there = queued(empty, GPU)
        copy = HostCopy(there)
        assert there.is_cuda and waits == []
        assert torch.equal(copy.wait(), empty) and waits == ["event"]


@only_pretended
def test_what_goes_to_a_gpu_is_pinned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of other memory may wait for all that was queued before."""
    pytest.importorskip("triton")
    pinned: list[Tensor] = []
    pin: Callable[[Tensor], Tensor] = Tensor.pin_memory
    monkeypatch.setattr(Tensor, "pin_memory", lambda given: (pinned.append(given), pin(given))[1])
    with pretend_gpu():
        given = torch.ones(2)
        queued(queued(given, GPU), GPU)
    assert pinned and all(each is given for each in pinned)  # torch looks the method up once more
