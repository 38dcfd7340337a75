"""A row that is scored: clean tokens, seen through masked states that are drawn before the network is called.

The estimator is that of `prime_core.likelihood`: state k masks n_k of the M = L S digits, n_k uniform on 1..M and
stratified over the K states, and counts with the weight M / n_k. The noise is the counter-based one, so a state is a
function of (seed, k) alone, whatever is in the batch. One set of M uniform numbers gives both the mask (the n smallest)
and the masking probability v (the n-th smallest): ranks and order statistics of uniform numbers are independent, and
v given n is Beta(n, M - n + 1) as it must be.

Shapes: L tokens, S digits a token, M = L S, K states, P tokens with a masked digit, Q masked digits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.nll import SubtokenNLL
from kernels.noise import Purpose, uniform
from prime_core.likelihood import masked_counts, time_of_masking
from prime_core.sampling.plan import Event
from prime_core.schedule import Schedule

# Random numbers that exist at the same time while states are drawn (about 10 MB with what is computed of them).
_NUMBERS_AT_A_TIME = 2**17


class MaskedStates(NamedTuple):
    """States in which a row is shown to the network.

    Attributes:
        masked: (K, M) bool, position S + digit.
        t: (K,) float64, noise times.
        labels: (K,) int64, what the network is conditioned on; None for networks without labels.
    """

    masked: Tensor
    t: Tensor
    labels: Tensor | None

    def tensor_split(self, num_parts: int) -> list[MaskedStates]:
        """Cut the states into parts of about the same size, in order; none is empty if there are enough."""
        columns = [
            [None] * num_parts if part is None else torch.tensor_split(part, num_parts) for part in self
        ]
        return [MaskedStates(*part) for part in zip(*columns, strict=True)]


def draw_states(
    shape: tuple[int, int],
    num_samples: int,
    schedule: Schedule,
    seed: int,
    *,
    label: int | None = None,
    num_labels: int = 0,
) -> MaskedStates:
    """Draw the states of one row.

    Args:
        shape: (L, S).
        num_samples: K, at least 1.
        schedule: maps the masking probability to t.
        seed: 0..2**64-1.
        label: of all states.
        num_labels: without ``label``: number of labels, of which every state gets one at random; 0 for none.
    """
    length, num_digits = shape
    index = torch.arange(num_samples)
    zero = torch.zeros((), dtype=torch.int64)
    levels = (index + uniform(seed, zero, index, Purpose.SCORE_COUNT)) / num_samples
    counts = masked_counts(levels, length * num_digits)
    block = max(1, _NUMBERS_AT_A_TIME // (length * num_digits))
    parts = [
        _mask(shape, part, n, seed) for part, n in zip(index.split(block), counts.split(block), strict=True)
    ]
    masked, v = (torch.cat(part) for part in zip(*parts, strict=True))
    labels = None
    if label is not None:
        labels = torch.full((num_samples,), label)
    elif num_labels:
        labels = (uniform(seed, zero, index, Purpose.SCORE_LABEL) * num_labels).long()
    return MaskedStates(masked, time_of_masking(v, schedule), labels)


def _mask(shape: tuple[int, int], states: Tensor, counts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Mask counts[k] digits in each of some states: (k, M) bool, and (k,) the masking probabilities."""
    length, num_digits = shape
    positions = torch.arange(length)[None, :, None]
    index = states[:, None, None] * num_digits + torch.arange(num_digits)
    u = uniform(seed, positions, index, Purpose.SCORE_MASK).flatten(1)
    v = u.sort(1).values.gather(1, counts[:, None] - 1)
    return u <= v, v[:, 0]


@dataclass(eq=False, slots=True)
class ScoreRow:
    """Some of the states of one scored input, one denoiser call each.

    To the stepper it looks like a row of which each event masks some digits of the clean ones again.

    Attributes:
        y: (L, S) int64, the clean digits; never written.
        x_0: (L,) int64, the tokens.
        states: what the network is shown.
        nats: (K, 2) float64, the contribution of each state to `nelbo` and to `coded_loss`; filled in call by call.
        token_nats: (L, 2) float64, the same for each token, summed over the states; None if nobody asks.
        next_event: index of the state that comes next, and the number of calls it has had.
        failed: the network gave no finite probabilities for it; it takes no further call.
        length: number of tokens L.
    """

    y: Tensor
    x_0: Tensor
    states: MaskedStates
    nats: Tensor
    token_nats: Tensor | None = None
    next_event: int = 0
    failed: bool = False
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = len(self.y)

    @property
    def remaining(self) -> int:
        """Denoiser calls left."""
        return 0 if self.failed else len(self.nats) - self.next_event

    @property
    def done(self) -> bool:
        """Whether the row takes no further call."""
        return self.remaining == 0

    @property
    def num_bytes(self) -> int:
        """Memory of its states and its results; the digits are those of the input, which its rows share."""
        results = self.nats.nbytes + (0 if self.token_nats is None else self.token_nats.nbytes)
        return self.states.masked.nbytes + self.states.t.nbytes + results

    @property
    def label(self) -> int | None:
        """What the network is conditioned on in the next call."""
        labels = self.states.labels
        return None if labels is None else int(labels[self.next_event])

    @property
    def event(self) -> Event:
        """The next call: which digits it masks, and the tokens they are digits of."""
        masked = self.states.masked[self.next_event].numpy()
        due = masked.reshape(self.y.shape)
        positions = np.flatnonzero(due.any(-1))
        t = float(self.states.t[self.next_event])
        return Event(self.next_event, t, positions, due[positions], np.flatnonzero(masked))

    def record(self, event: Event, nll: SubtokenNLL) -> None:
        """Count what the state of a call costs; if that is not finite, the row has failed.

        Args:
            event: the call, which the row has moved past.
            nll: of its P tokens, (P,) each, on the CPU.
        """
        # Digit by digit first: the bound before the coded loss, in `nats` as everywhere.
        each = torch.stack([nll.digits, nll.coded], -1).double()
        each *= self.states.masked.shape[1] / len(event.remasked)
        if not bool(each.isfinite().all()):
            self.failed, self.next_event = True, event.step
            return
        self.nats[event.step] = each.sum(0)
        if self.token_nats is not None:
            self.token_nats[event.positions] += each


def new_score_rows(
    y: Tensor, x_0: Tensor, states: MaskedStates, num_rows: int, *, per_token: bool = False
) -> tuple[ScoreRow, ...]:
    """Share the states of an input out to rows, whose calls can be made together.

    Args:
        y: (L, S) int64, the clean digits.
        x_0: (L,) int64, the tokens.
        states: of the input.
        num_rows: 1..K.
        per_token: whether to keep what each token costs.
    """
    return tuple(
        ScoreRow(
            y,
            x_0,
            part,
            torch.zeros(len(part.t), 2, dtype=torch.float64),
            torch.zeros(len(y), 2, dtype=torch.float64) if per_token else None,
        )
        for part in states.tensor_split(num_rows)
    )
