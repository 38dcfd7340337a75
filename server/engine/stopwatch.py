"""How long denoiser calls take, and whether the one that runs, or the thread that makes them, hangs."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Self

from server.engine.call_cost import CallCost, CallCostFit

MIN_STALL_S = 4.0  # /ready must tell of a hang within 5 s, unless calls are that slow
MIN_CALLS = 10  # timed before `fastest_s` and `cost` by tokens say anything: the first ones are slow
STALL_FACTOR = 10.0  # a call that takes this many times the usual is taken for a hang


class Pulse:
    """Whether a thread is in a piece of work, a block ``with`` this, and for how long; any thread may read it."""

    def __init__(self) -> None:
        self._started_s: float | None = None

    # Spelled out: in every step, a generator for a context would cost more than all it does.
    def __enter__(self) -> Self:
        self._started_s = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._started_s = None

    @property
    def seconds(self) -> float:
        """How long the piece of work has gone on; 0 between two."""
        started_s = self._started_s
        return 0.0 if started_s is None else time.monotonic() - started_s


class CallStopwatch(Pulse):
    """Times the calls of one thread; any thread may read it.

    Attributes:
        last_s: seconds of the last call that did not raise; 0 before the first.
        seconds_per_call: running mean over such calls; 0 before the first.
        fastest_s: seconds of the fastest of them; 0 before there were a few.
        cost: what calls take, by those of late; nothing before the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last_s = 0.0
        self.seconds_per_call = 0.0
        self.fastest_s = 0.0
        self.cost = CallCost()
        self._fit = CallCostFit()
        self._tokens_per_call = 0.0  # running mean
        self._only_trials = False
        self._num_tokens = 0  # of the call that runs, or of the last one
        self._min_s = math.inf
        self._num_calls = 0
        self._ended_s = -math.inf

    def call(self, num_tokens: int) -> Self:
        """Watch the block, ``with`` this, in which a call over so many tokens begins or is waited for."""
        self._num_tokens = num_tokens
        return self

    def raised(self) -> None:
        """Note that a call has ended now by raising; it counts for nothing."""
        self._ended_s = time.monotonic()

    def ended(self, begun_s: float, num_tokens: int, *, telling: bool = True) -> None:
        """Count a call that has ended now.

        Args:
            begun_s: `time.monotonic()` when it was begun. If others had not ended by then, it ran after them.
            num_tokens: of its rows.
            telling: whether `last_s` tells what such calls take; not if it may have been over long before.
        """
        now_s = time.monotonic()
        self.last_s = now_s - max(begun_s, self._ended_s)
        self._ended_s = now_s
        if not telling:
            return
        if self._only_trials:
            self._only_trials, self._num_calls, self._fit = False, 0, CallCostFit()
        self._num_calls += 1
        self._min_s = min(self._min_s, self.last_s)
        if self._num_calls >= MIN_CALLS:
            self.fastest_s = self._min_s
        weight = 0.1 if self._num_calls > 1 else 1.0
        self.seconds_per_call += weight * (self.last_s - self.seconds_per_call)
        self._tokens_per_call += weight * (num_tokens - self._tokens_per_call)
        line = self._fit.add(num_tokens, self.last_s)
        # The first ones at any size compile and allocate: what tokens add, they would put far too high.
        self.cost = line if self._num_calls >= MIN_CALLS else CallCost(self.seconds_per_call, 0.0)

    def end_trials(self) -> None:
        """Let the calls so far, which compiled and allocated, be a guide no longer than until the next one."""
        self._only_trials = True

    @property
    def stalled(self) -> bool:
        """Whether a call has run for far longer than calls do."""
        return self.seconds > self.limit_s

    @property
    def limit_s(self) -> float:
        """Seconds after which the call that runs, or another like the last one, is taken for a hang.

        A call over more tokens than usual may take longer than usual, in proportion: `cost` alone might say less, as it
        is carried on beyond the calls that it was fitted to.
        """
        in_proportion_s = self._num_tokens / max(self._tokens_per_call, 1.0) * self.seconds_per_call
        usual_s = max(self.seconds_per_call, in_proportion_s)
        return max(MIN_STALL_S, STALL_FACTOR * usual_s)
