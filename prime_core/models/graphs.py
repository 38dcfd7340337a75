"""CUDA graphs of a network's trunk: a call that comes again in the same shapes is launched as one piece.

A small model on a GPU waits for the launches of its kernels. A graph launches all of a recorded call at once,
on the tensors that it was recorded with: inputs are copied in, and results stand where they stood before. So only
calls of the same shapes share a graph, to record one costs as much as several calls, and each holds memory. A server
meets many mixes of lengths: graphs are few and only of what comes again and again; all else runs without, with the
same results.

Off unless somebody sets `GraphedNetwork.graphs`. NOT MEASURED YET: none of this has run on a GPU. Neither what graphs
save nor what they cost is known, and `RECORD_AFTER` is a guess.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

RECORD_AFTER = 8  # times that a call must have come: about as many calls as recording it costs
MAX_CANDIDATES = 128  # calls without a graph whose coming is remembered

_Outputs = TypeVar("_Outputs")
_Prepare = Callable[[], Callable[..., _Outputs]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class Recording:
    """A recorded call.

    Attributes:
        outputs: what it gave: always the same tensors, whose values come with ``replay``.
        replay: computes again from what its inputs hold now.
        pool: its memory. Recordings that share one destroy each other's results: they are good until the next replay.
    """

    outputs: Any
    replay: Callable[[], None]
    pool: Any


Recorder = Callable[[Callable[[], Any], Any], Recording]
"""Records a function, which reads the same tensors each time, in the pool of a living recording or (None) in a new one.

What is recorded neither waits for the device nor brings anything to it from the host.
"""


@dataclass(eq=False, slots=True)
class _Kept:
    recording: Recording
    inputs: Mapping[str, Tensor]  # what it reads
    last_used: int  # number of a call


class TrunkGraphs:
    """The recorded calls of one network. One thread at a time may call.

    A call is recorded when it has come `RECORD_AFTER` times. Where there is no room, it takes the place of the
    recording that was least recently used, unless that was used meanwhile: mixes that take turns do not drive each
    other out.

    Attributes:
        max_graphs: most recordings at a time.
        num_replays: calls so far that were replays.
    """

    def __init__(self, max_graphs: int, recorder: Recorder) -> None:
        """Start without recordings.

        Raises:
            ValueError: if ``max_graphs`` is below 1.
        """
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1, got {max_graphs}")
        self.max_graphs = max_graphs
        self.num_replays = 0
        self._recorder: Recorder | None = recorder  # None once they are given up
        # The least recently used first, in both; of calls without a graph the numbers of the latest.
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._came: OrderedDict[Hashable, deque[int]] = OrderedDict()
        self._num_calls = 0

    def __len__(self) -> int:
        """Return the number of recordings."""
        return len(self._kept)

    def clear(self) -> None:
        """Forget all recordings, as when the weights that they read are gone."""
        self._kept.clear()
        self._came.clear()

    def __call__(self, key: Hashable, prepare: _Prepare[_Outputs], inputs: Mapping[str, Tensor]) -> _Outputs:
        """Return what ``prepare()(**inputs)`` gives; its tensors are good until the next call.

        Args:
            key: all that the call depends on but the inputs.
            prepare: brings to the device what depends on the key, and returns a function that can be recorded.
            inputs: tensors by name, on the device.
        """
        self._num_calls += 1
        key = (key, *((name, each.shape, each.dtype, each.device) for name, each in inputs.items()))
        kept = self._kept.get(key)
        if kept is None and self._is_due(key):
            kept = self._record(key, prepare, inputs)
        if kept is not None:
            self._kept.move_to_end(key)
            kept.last_used = self._num_calls
            for name, each in inputs.items():
                kept.inputs[name].copy_(each)
            kept.recording.replay()
            self.num_replays += 1
            return cast(_Outputs, kept.recording.outputs)
        try:
            outputs = prepare()(**inputs)
        except torch.OutOfMemoryError:
            if not self._kept:
                raise
        else:
            self._note(key)
            return outputs
        self._give_up()
        return prepare()(**inputs)

    def _note(self, key: Hashable) -> None:
        """Remember that a call came."""
        if self._recorder is not None:
            self._came.setdefault(key, deque(maxlen=RECORD_AFTER)).append(self._num_calls)
            self._came.move_to_end(key)
            if len(self._came) > MAX_CANDIDATES:
                self._came.popitem(last=False)

    def _is_due(self, key: Hashable) -> bool:
        came = self._came.get(key)
        if self._recorder is None or came is None or len(came) < RECORD_AFTER:
            return False
        return len(self._kept) < self.max_graphs or next(iter(self._kept.values())).last_used < came[0]

    def _record(self, key: Hashable, prepare: _Prepare[Any], inputs: Mapping[str, Tensor]) -> _Kept | None:
        """Record a call, in the place of another where there is no room; None if it fails."""
        assert self._recorder is not None
        if len(self._kept) == self.max_graphs:
            self._kept.popitem(last=False)
        pool = next((kept.recording.pool for kept in self._kept.values()), None)
        try:
            own = {name: each.clone(memory_format=torch.contiguous_format) for name, each in inputs.items()}
            recording = self._recorder(partial(prepare(), **own), pool)
        except Exception as error:  # noqa: BLE001  # whatever it is, the call can do without
            self._give_up(error)
            return None
        del self._came[key]
        self._kept[key] = _Kept(recording, own, self._num_calls)
        return self._kept[key]

    def _give_up(self, error: Exception | None = None) -> None:
        """Free what recordings hold, and make no more of them."""
        self._recorder = None
        self.clear()
        # Not by type: CUDA's runtime has an error of its own.
        if error is None or "out of memory" in str(error).lower():
            _log.warning("memory is short: CUDA graphs are given up, calls go on without")
        else:
            # Torch's allocator believes for good that a recording goes on, if CUDA refused to end it.
            _log.error(
                "a CUDA graph cannot be recorded: calls go on without; better start again without them",
                exc_info=error,
            )


def cuda_graphs(max_graphs: int, device: torch.device) -> TrunkGraphs:
    """Return CUDA graphs for a network, to be set as its `graphs`.

    Args:
        max_graphs: most graphs at a time, at least 1.
        device: of the network.

    Raises:
        ValueError: if the device is not a CUDA device, or ``max_graphs`` is below 1.
    """
    if device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, and this one is {str(device)!r}")
    return TrunkGraphs(max_graphs, partial(record_cuda_graph, torch.cuda.Stream(device)))


def record_cuda_graph(stream: torch.cuda.Stream, run: Callable[[], Any], pool: Any) -> Recording:
    """Record a function on a stream of its own; a `Recorder` once it has a stream.

    It is called twice: what it compiles, loads and allocates for good cannot be recorded.
    """
    current, graph = torch.cuda.current_stream(stream.device), torch.cuda.CUDAGraph()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # puts the stream back, also where the inner context fails to
        run()
        # Other threads may allocate meanwhile: a server loads new weights in one.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            outputs = run()
    current.wait_stream(stream)
    return Recording(outputs, graph.replay, graph.pool())


class GraphedNetwork(nn.Module):
    """A network whose trunk can be recorded.

    Recordings read the weights where they lie. Who puts other tensors in their place must call `TrunkGraphs.clear`, as
    moving the network and training mode do.

    Attributes:
        graphs: take the calls under `torch.inference_mode`, without autocast, in evaluation mode; None for no graphs.
    """

    graphs: TrunkGraphs | None = None

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode."""
        if mode:
            self._forget_graphs()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget_graphs()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _forget_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.clear()

    def _run_trunk(
        self, key: Hashable, prepare: _Prepare[_Outputs], inputs: Mapping[str, Tensor]
    ) -> _Outputs:
        """Make a call, recorded or not; arguments as those of `TrunkGraphs`."""
        # A recording's inputs are tensors of inference mode, which nothing outside of it may write to.
        eager = self.training or not torch.is_inference_mode_enabled()
        if self.graphs is None or eager or torch.is_autocast_enabled(inputs["y_t"].device.type):
            return prepare()(**inputs)
        return self.graphs(key, prepare, inputs)
