"""Graphs of the trunk give the same results, and there are none where they would be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.models.dit import DiT
from prime_core.models.graphs import RECORD_AFTER, GraphedNetwork, TrunkGraphs, cuda_graphs
from prime_core.sampling.dense import DenseSamples, sample_dense
from prime_core.sampling.sample import sample
from prime_core.sampling.settings import SamplingSettings
from prime_core.schedule import LinearSchedule
from tests.prime_core.graphed import IMAGE_LENGTH, MIXES, image_call, make_dit, text_call
from tests.prime_core.random_dit import random_dit
from tests.prime_core.random_unet import random_unet
from tests.recorder import RerunRecorder
from tests.stubs import byte_tokenizer, stub_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def recorded(network: GraphedNetwork, max_graphs: int = 4) -> Iterator[TrunkGraphs]:
    network.graphs = TrunkGraphs(max_graphs, RerunRecorder())
    try:
        yield network.graphs
    finally:
        network.graphs = None


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


def test_graphs_are_off_unless_they_are_set_and_need_cuda() -> None:
    assert make_dit().graphs is None and random_unet().graphs is None
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, and this one is 'cpu'"):
        cuda_graphs(2, torch.device("cpu"))


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
