"""Graphs of the trunk: the same results, few of them, and none where they would be wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.settings import computing_threads
from prime_core.codec import SubtokenCodec
from prime_core.config import CodecConfig, DiTConfig
from prime_core.models import graphs as graphs_module
from prime_core.models.dit import DiT
from prime_core.models.graphs import (
    MAX_CANDIDATES,
    RECORD_AFTER,
    GraphedNetwork,
    TrunkGraphs,
    cuda_graphs,
    record_cuda_graph,
)
from prime_core.models.unet import UNet
from prime_core.sampling.dense import DenseSamples, sample_dense
from prime_core.sampling.sample import sample
from prime_core.sampling.settings import SamplingSettings
from prime_core.schedule import CosineSchedule, LinearSchedule
from tests.prime_core.random_dit import random_dit
from tests.prime_core.test_step_cache import random_unet
from tests.recorder import RerunRecorder
from tests.stubs import byte_tokenizer, stub_checkpoint

CODEC = SubtokenCodec(64, 3)  # base 4
MIXES = ([16, 16, 16], [10, 18, 20], [9, 12, 9, 18], [33])
IMAGE_LENGTH = 3 * 2 * 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other in hundreds of tiny calls take minutes on a busy machine."""
    with computing_threads(1):
        yield


def make_dit(*, time_conditioned: bool = False, dtype: torch.dtype = torch.float32) -> DiT:
    config = DiTConfig(
        hidden_size=24, num_blocks=3, num_heads=2, cond_dim=8, length=64, time_conditioned=time_conditioned
    )
    with torch.random.fork_rng(devices=[]):
        network = DiT(config, CodecConfig(vocab_size=64, target_length=3), CosineSchedule())
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    network = network.eval().requires_grad_(False)
    network.prepare()
    return network


def text_call(network: DiT, lengths: list[int], seed: int) -> Tensor:
    """One call at other digits, times and positions for every seed."""
    generator = torch.Generator().manual_seed(seed)
    y_t = torch.randint(0, CODEC.base + 1, (sum(lengths), 3), generator=generator)
    t = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    positions = torch.randint(sum(lengths), (1 + seed % 7,), generator=generator) if seed % 3 else None
    device = next(network.parameters()).device
    return network.features(y_t.to(device), lengths, t.to(device), positions)


def image_call(network: UNet, num_images: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    y_t = torch.randint(0, 5, (num_images * IMAGE_LENGTH, 2), generator=generator)
    t = torch.rand(num_images, generator=generator, dtype=torch.float64)
    labels = torch.randint(network.config.num_labels, (num_images,), generator=generator)
    device = next(network.parameters()).device
    features = network.features(
        y_t.to(device),
        [IMAGE_LENGTH] * num_images,
        t.to(device),
        torch.arange(0, len(y_t), 5),
        labels if network.config.labels == "class" else None,
    )
    return network.head(features)


@contextmanager
def recorded(network: GraphedNetwork, max_graphs: int = 4) -> Iterator[TrunkGraphs]:
    network.graphs = TrunkGraphs(max_graphs, RerunRecorder())
    try:
        yield network.graphs
    finally:
        network.graphs = None


# --- the same results ---------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time_conditioned", [False, True])
def test_text_features_are_the_same(time_conditioned: bool, dtype: torch.dtype) -> None:
    network = make_dit(time_conditioned=time_conditioned, dtype=dtype)
    with recorded(network) as graphs:
        for seed in range(RECORD_AFTER + 4):
            for lengths in MIXES:
                with_graphs = text_call(network, lengths, seed)
                network.graphs = None
                assert torch.equal(with_graphs, text_call(network, lengths, seed))
                network.graphs = graphs
        assert (len(graphs), graphs.num_replays) == (len(MIXES), 4 * len(MIXES))


@torch.inference_mode()
@pytest.mark.parametrize("labels", ["none", "class"])
@pytest.mark.parametrize("time_conditioned", [False, True])
def test_image_logits_are_the_same(time_conditioned: bool, labels: str) -> None:
    others: dict[str, Any] = {"labels": labels, "num_labels": 3} if labels == "class" else {}
    network = random_unet(time_conditioned=time_conditioned, **others)
    with recorded(network) as graphs:
        for seed in range(RECORD_AFTER + 4):
            for num_images in (2, 3):
                with_graphs = image_call(network, num_images, seed)
                network.graphs = None
                assert torch.equal(with_graphs, image_call(network, num_images, seed))
                network.graphs = graphs
        assert (len(graphs), graphs.num_replays) == (2, 8)


def test_samples_are_the_same() -> None:
    codec = SubtokenCodec(257, 2)
    network = random_dit(codec, length=64)
    checkpoint = stub_checkpoint(codec, network, context=64, tokenizer=byte_tokenizer())
    fields: dict[str, Any] = {"n": 5, "steps": "exact", "seed": 3, "max_tokens": 24, "prompt": "a prompt"}
    before = [output.token_ids for output in sample(checkpoint, **fields)]
    with recorded(network) as graphs:
        assert [output.token_ids for output in sample(checkpoint, **fields)] == before
        assert graphs.num_replays > 20


@pytest.mark.parametrize("kind", ["text", "images"])
def test_what_a_step_cache_keeps_is_not_overwritten(kind: str) -> None:
    codec = SubtokenCodec(16, 2)
    network = random_dit(codec, length=IMAGE_LENGTH) if kind == "text" else random_unet()
    # As many rows as never change their number in a call: many calls of one shape.
    y = torch.full((3, IMAGE_LENGTH, 2), codec.mask_index)

    def run() -> DenseSamples:
        return sample_dense(network, codec, LinearSchedule(), y, [1, 2, 3], 60, SamplingSettings())

    before = run()
    with recorded(network) as graphs:
        after = run()
        assert graphs.num_replays > 5
    assert torch.equal(before.y, after.y) and bool(after.ok.all())


# --- few, and of what comes often ---------------------------------------------------------------------------


def doubled(graphs: TrunkGraphs, size: int, times: int = 1) -> None:
    """Make calls of a shape and check what they give."""
    for time in range(times):
        values = torch.full((size,), float(time))
        assert torch.equal(graphs("double", lambda: lambda x: 2 * x, {"x": values}), 2 * values)


def test_a_call_is_recorded_when_it_has_come_often() -> None:
    recorder = RerunRecorder()
    graphs = TrunkGraphs(2, recorder)
    for _ in range(RECORD_AFTER):
        assert len(graphs) == graphs.num_replays == 0
        doubled(graphs, 1)
        doubled(graphs, 2)
    doubled(graphs, 1)
    assert (len(graphs), graphs.num_replays) == (1, 1)
    doubled(graphs, 2, times=5)
    assert (len(graphs), graphs.num_replays) == (2, 6)
    assert recorder.pools[0] is None and recorder.pools[1] is not None  # one memory for all


def test_other_keys_types_and_names_are_other_calls() -> None:
    graphs = TrunkGraphs(9, RerunRecorder())
    for _ in range(RECORD_AFTER + 1):
        for key in ("one", "two"):
            for dtype in (torch.float32, torch.float64):
                graphs(key, lambda: lambda x: 2 * x, {"x": torch.ones(3, dtype=dtype)})
        graphs("one", lambda: lambda z: 3 * z, {"z": torch.ones(3)})
    assert (len(graphs), graphs.num_replays) == (5, 5)


def test_the_least_recently_used_one_goes_if_it_rests() -> None:
    graphs = TrunkGraphs(2, RerunRecorder())
    for size in (1, 2):
        doubled(graphs, size, RECORD_AFTER + 1)
    doubled(graphs, 1)
    before = graphs.num_replays
    doubled(graphs, 3, RECORD_AFTER + 1)  # takes the place of 2
    assert (len(graphs), graphs.num_replays) == (2, before + 1)
    doubled(graphs, 1)
    doubled(graphs, 2, RECORD_AFTER)
    assert graphs.num_replays == before + 2


def test_calls_that_take_turns_do_not_drive_each_other_out() -> None:
    recorder = RerunRecorder()
    graphs = TrunkGraphs(2, recorder)
    for _ in range(5 * RECORD_AFTER):
        for size in (1, 2, 3):
            doubled(graphs, size)
    assert len(recorder.pools) == len(graphs) == 2
    assert graphs.num_replays == 2 * 4 * RECORD_AFTER


def test_a_place_is_free_again_once_its_call_stays_away() -> None:
    graphs = TrunkGraphs(1, RerunRecorder())
    for _ in range(2 * RECORD_AFTER):
        doubled(graphs, 1)
        doubled(graphs, 2)
    before = graphs.num_replays
    doubled(graphs, 2, RECORD_AFTER - 1)
    assert graphs.num_replays == before
    doubled(graphs, 2, 2)
    assert graphs.num_replays > before


def test_what_came_is_not_remembered_for_ever() -> None:
    graphs = TrunkGraphs(1, RerunRecorder())
    for round_ in range(RECORD_AFTER):
        doubled(graphs, 1)
        for other in range(MAX_CANDIDATES):
            doubled(graphs, 2 + round_ * MAX_CANDIDATES + other)
    doubled(graphs, 1)
    assert len(graphs) == 0 and len(graphs._came) == MAX_CANDIDATES


@pytest.mark.parametrize("max_graphs", [0, -1])
def test_no_graphs_are_no_graphs_object(max_graphs: int) -> None:
    with pytest.raises(ValueError, match="max_graphs must be at least 1"):
        TrunkGraphs(max_graphs, RerunRecorder())


def test_graphs_are_off_unless_they_are_set_and_need_cuda() -> None:
    assert make_dit().graphs is None and random_unet().graphs is None
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, and this one is 'cpu'"):
        cuda_graphs(2, torch.device("cpu"))


# --- none where they would be wrong -------------------------------------------------------------------------


def calls(network: DiT, context: Callable[[], Any], times: int = RECORD_AFTER + 2) -> None:
    for seed in range(times):
        with context():
            text_call(network, [16, 16], seed)


def test_only_inference_without_autocast_is_recorded() -> None:
    network = make_dit()
    with recorded(network) as graphs:
        calls(network, torch.enable_grad)
        calls(network, torch.no_grad)
        with torch.autocast("cpu", torch.bfloat16):
            calls(network, torch.inference_mode)
        network.train()
        calls(network, torch.inference_mode)
        assert len(graphs) == len(graphs._came) == 0
        network.eval()
        calls(network, torch.inference_mode)
        assert graphs.num_replays == 2
        calls(network, torch.no_grad, times=1)  # after a recording too
        assert graphs.num_replays == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda network: network.prepare(),
        lambda network: network.train().eval(),
        lambda network: network.to(torch.bfloat16),
    ],
)
def test_recordings_go_with_the_weights_that_they_read(change: Callable[[DiT], Any]) -> None:
    network = make_dit()
    with recorded(network) as graphs:
        calls(network, torch.inference_mode)
        assert len(graphs) == 1
        change(network)
        assert len(graphs) == 0
        calls(network, torch.inference_mode)
        assert len(graphs) == 1


# --- without memory -----------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize(
    ("error", "words", "has_traceback"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "memory is short: CUDA graphs are given up", False),
        (RuntimeError("CUDA error: out of memory"), "memory is short: CUDA graphs are given up", False),
        (RuntimeError("operation not permitted"), "a CUDA graph cannot be recorded", True),
    ],
)
def test_calls_go_on_where_recording_fails(
    error: Exception, words: str, has_traceback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    network, recorder = make_dit(), RerunRecorder()
    expected = [text_call(network, [16, 16], seed) for seed in range(3 * RECORD_AFTER)]
    network.graphs = TrunkGraphs(2, recorder)
    for seed in range(RECORD_AFTER + 1):
        text_call(network, [33], seed)
    assert len(network.graphs) == 1
    recorder.error = error
    with caplog.at_level(logging.WARNING):
        for seed, features in enumerate(expected):
            assert torch.equal(text_call(network, [16, 16], seed), features)
        text_call(network, [33], 0)
    assert len(network.graphs) == len(network.graphs._came) == 0  # what there was is freed
    (record,) = caplog.records
    assert words in record.message and (record.exc_info is not None) == has_traceback


def test_graphs_make_room_for_a_call_that_runs_out_of_memory(caplog: pytest.LogCaptureFixture) -> None:
    graphs = TrunkGraphs(2, RerunRecorder())

    def prepare() -> Callable[..., Tensor]:
        if len(graphs):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda x: 3 * x

    doubled(graphs, 1, RECORD_AFTER + 1)
    assert torch.equal(graphs("large", prepare, {"x": torch.ones(2)}), torch.full((2,), 3.0))
    assert len(graphs) == 0 and "memory is short" in caplog.text
    doubled(graphs, 1, 2 * RECORD_AFTER)
    assert len(graphs) == 0
    assert len(caplog.records) == 1


def test_a_call_that_runs_out_of_memory_by_itself_says_so() -> None:
    def prepare() -> Callable[..., Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        TrunkGraphs(2, RerunRecorder())("large", prepare, {"x": torch.ones(2)})


# --- what is recorded stays on the device -------------------------------------------------------------------


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


# --- the graphs of CUDA -------------------------------------------------------------------------------------


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
@pytest.mark.parametrize("kind", ["text", "text with times", "images"])
def test_cuda_graphs_give_what_calls_without_them_give(kind: str) -> None:
    device = torch.device("cuda")
    network: Any = random_unet(labels="class", num_labels=3) if kind == "images" else None
    if network is None:
        network = make_dit(time_conditioned=kind == "text with times", dtype=torch.bfloat16)
    network = network.to(device)
    shapes: list[Any] = [1, 2, 3] if kind == "images" else list(MIXES)
    call = cast(Callable[..., Tensor], image_call if kind == "images" else text_call)
    if kind != "images":
        network.prepare()
    graphs = cuda_graphs(2, device)
    for round_ in range(3):
        for shape in shapes:  # more than there is room for, so that some have to go again and again
            for seed in range(RECORD_AFTER + 3):
                network.graphs = graphs
                with_graphs = call(network, shape, seed + round_)
                network.graphs = None
                assert torch.equal(with_graphs, call(network, shape, seed + round_))
    assert len(graphs) == 2 and graphs.num_replays >= 3 * 3 * len(shapes)
