"""Shares the engine's one thread between models: start-time fair queueing.

Every model has a clock that counts the seconds spent on it, and the next call goes to the busy model whose clock
is furthest behind. So models that are busy together get equal shares of the time, however long one call of theirs
takes. A model that had nothing to do is brought up to the present when it wakes: what it did not use is no claim
on the others (nor does time that it used while alone count against it).

A call is never interrupted, so a model waits at most for one call of each other model.
"""

from __future__ import annotations

from collections.abc import Iterable


class Turns:
    """Decides which model makes the next call."""

    def __init__(self, names: Iterable[str]) -> None:
        """Start all clocks at 0.

        Args:
            names: of the models; of those that are equally far behind, the first has the turn.
        """
        self._clock_s = dict.fromkeys(names, 0.0)
        self._present_s = 0.0  # where the clock of the last turn stood when it began

    def choose(self, busy: Iterable[str]) -> str | None:
        """Return the name of the model whose turn it is; None if none is busy.

        Args:
            busy: names of the models that have something to do.
        """
        clocks = self._clock_s
        names = set(busy)
        for name in names:
            # Those that were busy all the time are not behind.
            clocks[name] = max(clocks[name], self._present_s)
        chosen = min((name for name in clocks if name in names), key=clocks.__getitem__, default=None)
        if chosen is not None:
            self._present_s = clocks[chosen]
        return chosen

    def charge(self, name: str, seconds: float) -> None:
        """Count time that was spent on a model."""
        self._clock_s[name] += seconds
