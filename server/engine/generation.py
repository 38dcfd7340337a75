"""Weights of a model and the rows that began with them.

New weights serve new rows while the old rows finish with the old ones: for that time a model has two generations, which
take turns. So neither does a row see two networks, nor does a reload keep anybody waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prime_core.checkpoint import Checkpoint
from prime_core.sampling.stepper import Stepper
from server.engine.batcher import Batcher, Entry


@dataclass(frozen=True, eq=False, slots=True)
class Generation:
    """One checkpoint of a model and its rows.

    Attributes:
        checkpoint: the weights, and all else that is the same in every generation.
        stepper: makes its calls.
        batcher: holds its rows.
    """

    checkpoint: Checkpoint
    stepper: Stepper
    batcher: Batcher

    @classmethod
    def of(cls, checkpoint: Checkpoint, batcher: Batcher) -> Generation:
        """Return the generation of a checkpoint."""
        return cls(checkpoint, Stepper(checkpoint.denoiser, checkpoint.codec), batcher)


class Batch(NamedTuple):
    """The rows of a call.

    Attributes:
        generation: whose weights they are for.
        entries: the rows.
    """

    generation: Generation
    entries: Sequence[Entry]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(entry.row.length for entry in self.entries)


class Generations:
    """The one or two generations of a model. Whoever calls holds the lock around lists of jobs."""

    def __init__(self, checkpoint: Checkpoint, batcher: Batcher) -> None:
        """Begin with one."""
        self.current = Generation.of(checkpoint, batcher)
        self._old: Generation | None = None
        self._next: Checkpoint | None = None
        self._old_had_turn = False

    def __iter__(self) -> Iterator[Generation]:
        """Iterate over the old one, if there is one, and the current one."""
        return iter([self.current] if self._old is None else [self._old, self.current])

    def replace(self, checkpoint: Checkpoint) -> None:
        """Note the weights for the rows to come; they are taken by `renew`, the latest ones if there are several."""
        self._next = checkpoint

    @property
    def renewable(self) -> bool:
        """Whether `renew` would change anything."""
        free = self._old is None or not len(self._old.batcher)
        return free and (self._next is not None or self._old is not None)

    def renew(self) -> bool:
        """Between two calls: let go of weights without rows, and take new ones if that leaves at most two.

        Returns:
            Whether some weights are no longer held.
        """
        let_go = False
        if self._old is not None and not len(self._old.batcher):
            self._old, let_go = None, True
        if self._old is None and self._next is not None:
            if len(self.current.batcher):
                self._old = self.current
            else:
                let_go = True
            self.current = Generation.of(self._next, self.current.batcher.emptied())
            self._next = None
        return let_go

    def choose(self) -> Batch:
        """Return the rows of the next call: generations alternate as long as both have any."""
        chosen = self.current
        if self._old is not None and len(self._old.batcher):
            self._old_had_turn = not (self._old_had_turn and len(self.current.batcher))
            chosen = self._old if self._old_had_turn else self.current
        return Batch(chosen, chosen.batcher.choose())
