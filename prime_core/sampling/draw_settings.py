"""How the tokens of a row are drawn, position by position: made with its plan, so that a step only gathers it.

Shapes: T positions of all events of a plan, R positions of any events, S digits a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.noise import Purpose, uniform
from prime_core.sampling.curves import TemperatureCurve
from prime_core.sampling.plan import RevealPlan
from prime_core.sampling.settings import SamplingSettings

Numbers = NDArray[Any]

_NEUTRAL = (np.float32(1), np.int64(0), np.float32(1))  # temperature, top k, top p
_MAX_TOP_K = torch.iinfo(torch.int64).max  # more than any vocabulary has, and a request may ask for more yet


class DrawSettings(NamedTuple):
    """What draws of R positions need beside logits and digits, as numpy's arrays (`prime_core.sampling.plan.Event`).

    Attributes:
        u: (R,) float64 in (0, 1), one number per draw of a token; (R, S) where digits are drawn alone.
        temperature: (R,) float32; None where it is 1 at every position.
        top_k: (R,) int64, 0 = all; None where no position is truncated so.
        top_p: (R,) float32; None where no position is truncated so.
    """

    u: Numbers
    temperature: Numbers | None
    top_k: Numbers | None
    top_p: Numbers | None

    @property
    def num_bytes(self) -> int:
        """Memory of the numbers; what is the same at every position takes none."""
        varies = self.temperature is not None and self.temperature.strides != (0,)
        return self.u.nbytes + (self.u.shape[0] * 4 if varies else 0)


def draw_settings(plan: RevealPlan, settings: SamplingSettings, seed: int) -> DrawSettings:
    """Return how the tokens of all events of a plan are drawn.

    Every draw has the uniform number of purpose DRAW, its position and an index. A digit that is revealed once is its
    own index, and one that may be revealed again is numbered by step and digit. A token whose digits are drawn together
    takes the number of the lowest digit that is due.

    Args:
        plan: of the row.
        settings: of the row.
        seed: of the row, 0..2**64-1.

    Returns:
        R = T, in the order of the plan.
    """
    counts = plan.offsets.diff()
    digit = torch.arange(plan.due.shape[1])
    positions, first = plan.positions, 0 * plan.positions
    if plan.remasks:
        first = (plan.due.shape[1] * (1 + plan.steps)).repeat_interleave(counts)
    if settings.draw == "marginal":
        u = uniform(seed, positions[:, None], first[:, None] + digit, Purpose.DRAW)
    else:
        u = uniform(seed, positions, first + plan.due.int().argmax(-1), Purpose.DRAW)
    temperature = None
    if isinstance(settings.temperature, TemperatureCurve):
        each = [settings.temperature_at(t) for t in plan.times.tolist()]
        temperature = np.array(each, dtype=np.float32).repeat(counts.numpy())
    elif settings.temperature != 1:
        temperature = np.broadcast_to(np.float32(settings.temperature), len(positions))
    top_k = min(settings.top_k, _MAX_TOP_K)
    return DrawSettings(
        u.numpy(),
        temperature,
        np.broadcast_to(np.int64(top_k), len(positions)) if settings.top_k else None,
        np.broadcast_to(np.float32(settings.top_p), len(positions)) if settings.top_p < 1 else None,
    )


def join_draw_settings(parts: Sequence[DrawSettings], spans: Sequence[tuple[int, int]]) -> DrawSettings:
    """Return the draw settings of some positions of several rows, end to end.

    Args:
        parts: of whole rows, at least one; all draw tokens, or all draw digits alone.
        spans: start and stop of the positions of each.
    """
    numbered = enumerate(_NEUTRAL, 1)
    return DrawSettings(
        np.concatenate([part.u[start:stop] for part, (start, stop) in zip(parts, spans, strict=True)]),
        *(_join_or_none([part[field] for part in parts], spans, neutral) for field, neutral in numbered),
    )


def _join_or_none(
    values: Sequence[Numbers | None], spans: Sequence[tuple[int, int]], neutral: Any
) -> Numbers | None:
    """Join what some rows have, ``neutral`` for the others; None if none has it."""
    if all(each is None for each in values):
        return None
    return np.concatenate(
        [
            np.broadcast_to(neutral, stop - start) if each is None else each[start:stop]
            for each, (start, stop) in zip(values, spans, strict=True)
        ]
    )
