"""What is recorded stays on the device, and CUDA records it on a side stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from prime_core.models import graphs as graphs_module
from prime_core.models.graphs import record_cuda_graph
from tests.prime_core.graphed import MIXES, make_dit
from tests.prime_core.random_unet import random_unet

pytestmark = pytest.mark.usefixtures("one_thread")


class DeviceAlone(TorchDispatchMode):
    """Refuses tensors of the host. The device is "meta", which has no values that a call could wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, Tensor) or leaf.device.type == "meta", (
                f"{func} has a tensor of the host"
            )
        return result


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x + torch.tensor([1.0, 2.0]).to("meta"),
        lambda x: x[: int(x.sum())],
        lambda x: x.nonzero(),
        lambda x: x.repeat_interleave(torch.tensor([1, 2]).to("meta")),
    ],
)
def test_the_check_sees_what_cannot_be_recorded(spoil: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), DeviceAlone():
        spoil(torch.ones(2, device="meta"))


@torch.inference_mode()
@pytest.mark.parametrize("lengths", MIXES)
@pytest.mark.parametrize("time_conditioned", [False, True])
def test_text_trunk_stays_on_the_device(time_conditioned: bool, lengths: list[int]) -> None:
    network = make_dit(time_conditioned=time_conditioned, dtype=torch.bfloat16).to("meta")
    network.prepare()
    y_t = torch.zeros(sum(lengths), 3, dtype=torch.int64, device="meta")
    t = torch.zeros(len(lengths), dtype=torch.float64, device="meta") if time_conditioned else None
    packing = network._pack(lengths)
    with DeviceAlone():
        state = network._trunk(packing, y_t, t)
    assert state.x.shape == (sum(lengths), 24) and state.heads.q.shape == (sum(lengths), 2, 12)


@torch.inference_mode()
@pytest.mark.parametrize("time_conditioned", [False, True])
def test_image_trunk_stays_on_the_device(time_conditioned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # does not know "meta"
    network = random_unet(time_conditioned=time_conditioned, labels="class", num_labels=3).to("meta")
    y_t = torch.zeros(2, 3, 2, 2, 2, dtype=torch.int64, device="meta")
    t = torch.zeros(2, dtype=torch.float64, device="meta") if time_conditioned else None
    inputs = network._inputs(y_t, torch.zeros(2, dtype=torch.int64, device="meta"), t)
    with DeviceAlone():
        assert network._trunk(**inputs).shape == (2, 96, 2, 2)


class FakeCuda:
    """Stands for `torch.cuda`, and notes what is asked of it in which order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.stream_name = "main"
        self.fails = False

    def stream_of(self, name: str) -> Any:
        stream = type("Stream", (), {"device": torch.device("cuda")})()
        stream.name = name
        stream.wait_stream = lambda other: self.events.append(f"{name} waits for {other.name}")
        return stream

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.stream_name = self.stream_name, stream.name
        try:
            yield
        finally:
            self.stream_name = before

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        if self.fails:
            self.stream_name = "lost"
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.events.append(f"records on {stream.name}, {capture_error_mode}, pool {pool}")
        yield
        self.events.append("recorded")

    def current_stream(self, device: Any) -> Any:
        return self.stream_of("main")

    class CUDAGraph:
        def replay(self) -> None:
            pass

        def pool(self) -> str:
            return "of the graph"


def test_a_cuda_graph_is_warmed_up_and_recorded_on_a_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(graphs_module.torch, "cuda", fake)
    side = fake.stream_of("side")
    recording = record_cuda_graph(side, lambda: fake.events.append(f"runs on {fake.stream_name}"), "shared")
    assert fake.events == [
        "side waits for main",
        "runs on side",
        "records on side, thread_local, pool shared",
        "runs on side",
        "recorded",
        "main waits for side",
    ]
    assert recording.pool == "of the graph"
    fake.fails = True
    with pytest.raises(torch.OutOfMemoryError):
        record_cuda_graph(side, lambda: None, None)
    assert fake.stream_name == "main"
