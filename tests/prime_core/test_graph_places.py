"""Places for graphs are few: calls that come often take them, and lack of memory frees them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prime_core.models.graphs import MAX_CANDIDATES, RECORD_AFTER, TrunkGraphs
from tests.prime_core.graphed import make_dit, text_call
from tests.recorder import RerunRecorder

pytestmark = pytest.mark.usefixtures("one_thread")


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
