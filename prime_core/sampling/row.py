"""A row: one output while it is sampled, and the plan it follows.

Shapes: L tokens, S digits a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from prime_core.sampling.canvas import Canvas
from prime_core.sampling.correctors import Corrector
from prime_core.sampling.curves import TimeWarp
from prime_core.sampling.draw_settings import DrawSettings, draw_settings
from prime_core.sampling.plan import Event, RevealPlan, draw_plan
from prime_core.sampling.settings import SamplingSettings
from prime_core.sampling.time_grid import Steps
from prime_core.schedule import Schedule


@dataclass(eq=False, slots=True)
class Row:
    """One output while it is sampled.

    Attributes:
        y: (L, S) int64, the digits so far.
        plan: its events.
        settings: how its tokens are drawn.
        draws: the same, position by position of the plan.
        seed: 0..2**64-1.
        label: what the network is conditioned on; None for networks without labels.
        next_event: index of the event that comes next.
        failed: the network gave no finite logits for it; it takes no further step.
        length: number of tokens L.
    """

    y: Tensor
    plan: RevealPlan
    settings: SamplingSettings
    draws: DrawSettings
    seed: int
    label: int | None = None
    next_event: int = 0
    failed: bool = False
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = len(self.y)

    @property
    def remaining(self) -> int:
        """Denoiser calls left."""
        return 0 if self.failed else self.plan.nfe - self.next_event

    @property
    def done(self) -> bool:
        """Whether the row takes no further step."""
        return self.remaining == 0

    @property
    def num_bytes(self) -> int:
        """Memory of its digits and its plan."""
        return self.y.nbytes + self.plan.num_bytes + self.draws.num_bytes

    @property
    def event(self) -> Event:
        """The event that comes next."""
        return self.plan.event(self.next_event)

    @property
    def span(self) -> tuple[int, int]:
        """Start and stop of the next event's positions among those of all events."""
        return self.plan.span(self.next_event)


def new_row(
    canvas: Canvas,
    schedule: Schedule,
    settings: SamplingSettings,
    steps: Steps,
    seed: int,
    eps: float = 0.0,
    *,
    label: int | None = None,
    warp: TimeWarp | None = None,
    corrector: Corrector | None = None,
) -> Row:
    """Return a row at t = 1 with its reveal plan.

    Args:
        canvas: what is known.
        schedule: noise schedule.
        settings: how tokens are drawn; for "marginal" draws the caller has asked `check_draw`.
        steps: as for `draw_plan`, and so are ``seed``, ``eps``, ``warp`` and ``corrector``.
        seed: 0..2**64-1.
        eps: end of the grid.
        label: what the network is conditioned on; None for networks without labels.
        warp: warp of the time grid.
        corrector: how visible digits are masked again.

    Raises:
        ValueError: if an argument is out of range, see `draw_plan`.
    """
    plan = draw_plan(canvas.free, schedule, steps, seed, eps, warp=warp, corrector=corrector)
    return Row(canvas.y.clone(), plan, settings, draw_settings(plan, settings, seed), seed, label)
