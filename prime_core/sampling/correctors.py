"""Correctors: steps that also mask visible digits again, so that early mistakes can be drawn anew.

A corrector of discrete flow matching (arXiv 2407.15595) adds noise and its inverse to the reverse process: with
tau = 1 - t, kappa = alpha_t and kappa' = -alpha'_t, digits are revealed at the rate (1 + beta) kappa' / (1 - kappa)
and masked again at the rate beta kappa' / kappa. The two extra flows cancel, so the visible share stays kappa. The
strength is beta(tau) = scale tau^power (1 - tau)^final_power.

Neither rate depends on the value of any digit, only on the step. So all of a digit's history (revealed, masked again,
revealed anew, ...) can be drawn before the network is first called: a corrector is part of the reveal plan
(`prime_core.sampling.plan`). A step that only masks needs no denoiser call; the number of calls and the progress of a
request stay exact. This is less work than a cache of results, which a step that only masks would invalidate.

What happens in the step from t to s, h = t - s, with beta, kappa' and kappa taken at t, for each digit on its own:

    ordinary     masked -> visible with p1 = (alpha_s - alpha_t) / (1 - alpha_t)
    "corrected"  visible -> masked with sigma = min(1 - exp(-h beta kappa' / kappa), (1 - alpha_s) / alpha_t),
                 masked -> visible with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t): the posterior of ReMDM
                 (arXiv 2503.00307). The expected visible share is alpha at every time of the grid, exactly.
    "published"  masked -> visible with p1; visible at the START of the step -> masked with rho = 1 - exp(-h beta
                 kappa' / kappa); and a digit that p1 left masked gets a second chance p2 = 1 - exp(-h beta kappa' /
                 (1 - kappa)). So masked -> visible with 1 - (1 - p1)(1 - p2). The published code reads ``power`` for
                 both exponents and ignores the third parameter.

What "published" does to the visible share: a share of alpha_t becomes alpha_s + (1 - alpha_s) p2 - alpha_t rho. To
second order in h the surplus is (h kappa')^2 beta [beta (1 - 2 kappa) - 2 kappa] / (2 kappa (1 - kappa)): the
schedule is left by O(h), upwards while beta (1 - 2 kappa) > 2 kappa (early) and downwards after that (late). Digits
that are masked at the end of the grid are revealed there in one more event.

Where a schedule has alpha_1 > 0, a row still starts all masked. Its visible share is kappa = (alpha_t - alpha_1) /
(1 - alpha_1), and it stands in place of alpha in all of the above (p1 is the same in both).

Shapes: N steps of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from prime_core.sampling.curves import MAX_POWER, check_parameters
from prime_core.schedule import Schedule

CorrectorKind = Literal["corrected", "published"]

# A digit is masked again at most `scale` times on average (the integral of beta kappa' is at most scale), so this
# bounds the size of a plan.
MAX_CORRECTOR_SCALE = 100.0

_SMALLEST_SHARE = 1e-12


@dataclass(frozen=True, slots=True)
class Corrector:
    """How digits are masked again: strength beta(tau) = scale tau^power (1 - tau)^final_power, tau = 1 - t.

    Attributes:
        kind: "corrected" keeps the visible share on the schedule; "published" does what the published code does.
        scale: a in [0, 100]; 0 is no corrector. A digit is masked again at most so many times on average.
        power: p in [0, 100].
        final_power: q in [0, 100]; None takes ``power``. Only for "corrected": "published" always takes ``power``.
    """

    kind: CorrectorKind
    scale: float
    power: float
    final_power: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the parameter and its range, or that ``final_power`` means nothing here.
        """
        if self.kind not in get_args(CorrectorKind):
            raise ValueError("corrector.kind must be 'corrected' or 'published'")
        if self.kind == "published" and self.final_power is not None:
            raise ValueError(
                "corrector.final_power has no effect in the published sampler, which uses corrector.power "
                "twice; leave it out, or take kind 'corrected'"
            )
        last = self.power if self.final_power is None else self.final_power
        check_parameters("corrector", scale=self.scale, power=self.power, final_power=last)
        for name, value, limit in (
            ("scale", self.scale, MAX_CORRECTOR_SCALE),
            ("power", self.power, MAX_POWER),
            ("final_power", last, MAX_POWER),
        ):
            if not 0 <= value <= limit:
                raise ValueError(f"corrector.{name} must be in [0, {limit:g}], got {value:g}")

    def strength(self, t: Tensor) -> Tensor:
        """Return beta at noise times t (same shape, 0 <= beta <= scale)."""
        last = self.power if self.final_power is None else self.final_power
        return self.scale * (1 - t) ** self.power * t**last


class StepTables(NamedTuple):
    """What can happen to a digit in each step of a grid, by its state at the start of the step.

    Attributes:
        reveal: (N,) float64, probability that a masked digit is revealed.
        remask: (N,) float64, probability that a visible digit is masked again.
    """

    reveal: Tensor
    remask: Tensor


def step_tables(schedule: Schedule, times: Tensor, corrector: Corrector | None = None) -> StepTables:
    """Return the probabilities of every step of a grid; the formulas are at the top of this file.

    Args:
        schedule: noise schedule.
        times: (N + 1,) float64, 1 = t_0 >= ... >= t_N.
        corrector: None for plain ancestral sampling.
    """
    share = schedule.visible_share(times)
    now, then = share[:-1], share[1:]
    ordinary = _ratio(then - now, 1 - now)
    if corrector is None:
        return StepTables(ordinary, torch.zeros_like(ordinary))
    t, h = times[:-1], -times.diff()
    beta = corrector.strength(t)
    growth = -schedule.d_alpha_t(t) / (1 - schedule.alpha_final())
    # kappa' may be infinite at t = 1 (a power below 1); with no strength there is no flow, and no 0 * inf.
    flow = torch.where(beta * h > 0, h * beta * growth, 0.0)
    # Nothing is visible where the share is 0: no rate, however large, masks anything there.
    remask = torch.where(now > 0, -torch.expm1(-flow / now.clamp_min(_SMALLEST_SHARE)), 0.0)
    if corrector.kind == "published":
        second = -torch.expm1(-flow / (1 - now).clamp_min(_SMALLEST_SHARE))
        return StepTables(ordinary + (1 - ordinary) * second, remask)
    remask = remask.minimum(_ratio(1 - then, now))
    return StepTables(_ratio(then - (1 - remask) * now, 1 - now), remask)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient of two probabilities in [0, 1]; 0 where the denominator is 0: nothing is left to happen to."""
    quotient = numerator / torch.where(denominator > 0, denominator, 1.0)
    return torch.where(denominator > 0, quotient.clamp(0, 1), 0.0)
