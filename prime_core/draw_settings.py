"""How the tokens of a row are drawn, position by position: made with its plan, so that a step only gathers it.

Shapes: T positions of all events of a plan, R positions of any events, S digits a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.noise import Purpose, uniform
from prime_core.curves import TemperatureCurve
from prime_core.plan import RevealPlan
from prime_core.settings import SamplingSettings

_MAX_TOP_K = torch.iinfo(torch.int64).max  # more than any vocabulary has, and a request may ask for more yet


class DrawSettings(NamedTuple):
    """What the draws of R positions need beside their logits and digits; on the CPU.

    Attributes:
        u: (R,) float64 in (0, 1), one number per draw of a token; (R, S) where digits are drawn alone.
        temperature: (R,) float32; None where it is 1 at every position.
        top_k: (R,) int64, 0 = all; None where no position is truncated so.
        top_p: (R,) float32; None where no position is truncated so.
    """

    u: Tensor
    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory of the numbers; what is the same at every position takes none."""
        return self.u.nbytes + (
            0 if self.temperature is None else self.temperature.untyped_storage().nbytes()
        )

    def to(self, device: torch.device) -> DrawSettings:
        """Return them on a device."""
        u, *optional = self
        return DrawSettings(u.to(device), *(None if part is None else part.to(device) for part in optional))

    def between(self, start: int, stop: int) -> DrawSettings:
        """Return those of the positions ``start:stop``."""
        u, *optional = self
        return DrawSettings(u[start:stop], *(None if part is None else part[start:stop] for part in optional))


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
        each = torch.tensor([settings.temperature_at(t) for t in plan.times.tolist()])
        temperature = each.repeat_interleave(counts)
    elif settings.temperature != 1:
        temperature = torch.tensor(float(settings.temperature)).expand(len(positions))
    return DrawSettings(
        u,
        temperature,
        torch.tensor(min(settings.top_k, _MAX_TOP_K)).expand(len(positions)) if settings.top_k else None,
        torch.tensor(settings.top_p).expand(len(positions)) if settings.top_p < 1 else None,
    )


def join_draw_settings(parts: Sequence[DrawSettings]) -> DrawSettings:
    """Return the draw settings of several rows, end to end.

    Args:
        parts: at least one; all draw tokens, or all draw digits alone.
    """
    u = torch.cat([part.u for part in parts])
    optional = [
        _join_or_none([part[number] for part in parts], parts, neutral)
        for number, neutral in ((1, 1.0), (2, 0), (3, 1.0))
    ]
    return DrawSettings(u, *optional)


def _join_or_none(
    values: Sequence[Tensor | None], parts: Sequence[DrawSettings], neutral: float
) -> Tensor | None:
    """Join what some parts have, ``neutral`` for the others; None if none has it."""
    if all(each is None for each in values):
        return None
    filled = [
        torch.tensor(neutral).expand(len(part.u)) if each is None else each
        for each, part in zip(values, parts, strict=True)
    ]
    return torch.cat(filled)
