"""What a denoiser call takes, told by its tokens: a straight line through the calls of late."""

from __future__ import annotations

from typing import NamedTuple

DECAY = 0.97  # the past counts for so much less with every call: about 33 calls are remembered
# A call over nothing takes no time, says an observation of this weight, as long as all calls are of one size.
ORIGIN_WEIGHT = 0.1


class CallCost(NamedTuple):
    """Seconds of calls.

    Attributes:
        per_call_s: seconds that any call takes.
        per_token_s: that each of its tokens adds.
    """

    per_call_s: float = 0.0
    per_token_s: float = 0.0

    def seconds(self, num_calls: float, num_tokens: float) -> float:
        """Return the seconds of some calls that have so many tokens together."""
        return num_calls * self.per_call_s + num_tokens * self.per_token_s


class CallCostFit:
    """Fits the line by least squares, call after call.

    Small calls are told from large ones, so that a queue of cheap rows is not taken for one of dear ones.
    """

    def __init__(self) -> None:
        # Weighted sums over the calls: of 1, tokens, seconds, tokens ** 2 and tokens * seconds.
        self._weight = self._tokens = self._seconds = self._tokens_squared = self._product = 0.0

    def add(self, num_tokens: int, seconds: float) -> CallCost:
        """Learn of a call, and return the line, no part of which is negative.

        Args:
            num_tokens: its tokens, at least 1.
            seconds: how long it took.
        """
        self._weight = DECAY * self._weight + 1.0
        self._tokens = DECAY * self._tokens + num_tokens
        self._seconds = DECAY * self._seconds + seconds
        self._tokens_squared = DECAY * self._tokens_squared + num_tokens * num_tokens
        self._product = DECAY * self._product + num_tokens * seconds
        return self._line()

    def _line(self) -> CallCost:
        weight = self._weight + ORIGIN_WEIGHT
        mean_tokens, mean_seconds = self._tokens / weight, self._seconds / weight
        # Not zero: the origin is at a distance from any call.
        slope = (self._product - mean_tokens * self._seconds) / (
            self._tokens_squared - mean_tokens * self._tokens
        )
        if slope <= 0:  # larger calls were no slower
            return CallCost(self._seconds / self._weight, 0.0)
        constant = mean_seconds - slope * mean_tokens
        if constant <= 0:
            return CallCost(0.0, self._product / self._tokens_squared)
        return CallCost(constant, slope)
