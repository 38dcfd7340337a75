"""The time of a dense run from a few of its steps.

What a step of the dense sampler costs does not depend on what is masked: it handles every position. There are two
kinds of steps: those that call the network, and for text those that draw again from the last call's result because
the step before changed nothing. How many there are of each is known without the network: a digit is revealed in a
step with a probability that depends on no value, so the steps of all digits can be drawn first. So a run of N steps
takes its calls times the seconds of the first kind, and the rest times those of the second.

A figure that comes from here is always shown with `Extrapolation.label`.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.dense_published import DensePublished
from benchmarks.rates import timed
from prime_core.schedule import Schedule


@dataclass(frozen=True)
class Extrapolation:
    """A run's time from some of its steps.

    Attributes:
        timed_steps: steps K that were timed, of each kind.
        num_steps: steps N of the run.
        num_calls: denoiser calls of the run.
        num_redraws: steps that only draw.
        call_step_s: median seconds of a step with a call.
        redraw_step_s: median seconds of a step without; 0 where there is none.
    """

    timed_steps: int
    num_steps: int
    num_calls: int
    num_redraws: int
    call_step_s: float
    redraw_step_s: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return self.num_calls * self.call_step_s + self.num_redraws * self.redraw_step_s

    @property
    def label(self) -> str:
        """What must stand beside the figure."""
        return f"extrapolated from {self.timed_steps} of {self.num_steps} steps"

    def as_dict(self) -> dict[str, Any]:
        """Return what a document says about it."""
        return {"label": self.label, **asdict(self)}


def extrapolate(
    sampler: DensePublished, num_steps: int, timed_steps: int, generator: torch.Generator
) -> Extrapolation:
    """Time ``timed_steps`` steps of each kind that occurs, and count how many a whole run takes.

    Args:
        sampler: the dense sampler.
        num_steps: steps N of the run.
        timed_steps: steps K to time, at least 1; at most N are.
        generator: noise, on the device of the network.
    """
    timed_steps = min(timed_steps, num_steps)
    num_digits = sampler.num_positions * sampler.codec.target_length
    if sampler.time_free:
        counting = torch.Generator().manual_seed(generator.initial_seed())
        num_calls, num_redraws = count_calls(sampler.schedule, num_steps, num_digits, sampler.eps, counting)
    else:
        num_calls, num_redraws = num_steps, 0
    call_s = _step_seconds(sampler, timed_steps, generator, call=True)
    redraw_s = _step_seconds(sampler, timed_steps, generator, call=False) if num_redraws else 0.0
    return Extrapolation(timed_steps, num_steps, num_calls, num_redraws, call_s, redraw_s)


def count_calls(
    schedule: Schedule, num_steps: int, num_digits: int, eps: float, generator: torch.Generator
) -> tuple[int, int]:
    """Draw the step in which each of ``num_digits`` digits is revealed; return (calls, steps that only draw).

    The network is called in step 0 and after each step that revealed something; what is left at the end of the
    grid takes one more step.
    """
    bounds = reveal_bounds(schedule, num_steps, eps)
    u = torch.rand(num_digits, dtype=torch.float64, generator=generator)
    steps = torch.searchsorted(bounds, u, right=True)
    changed = torch.zeros(num_steps + 1, dtype=torch.bool)
    changed[steps] = True
    last = num_steps if bool(changed[num_steps]) else num_steps - 1  # the last step that is taken
    num_calls = 1 + int(changed[:last].sum())
    return num_calls, last + 1 - num_calls


def expected_calls(schedule: Schedule, num_steps: int, num_digits: int, eps: float) -> float:
    """Return the expected number of calls that `count_calls` draws."""
    bounds = torch.cat([torch.zeros(1, dtype=torch.float64), reveal_bounds(schedule, num_steps, eps)])
    unchanged = (1 - bounds.diff()) ** num_digits
    leftover = 1 - float(bounds[-1]) ** num_digits
    # Whether digits are left and whether the last step revealed any are next to independent, and both next to certain.
    return 1 + float((1 - unchanged[:-1]).sum()) + leftover * float(1 - unchanged[-1])


def reveal_bounds(schedule: Schedule, num_steps: int, eps: float) -> Tensor:
    """Return (N,) float64: the probability that a digit is visible after each step, if it was masked at t = 1.

    That of step k is prod_{i <= k} (1 - p_i) taken from 1, with p_i = (alpha_s - alpha_t) / (1 - alpha_t).
    """
    return schedule.visible_share(schedule.time_grid(num_steps, eps))[1:]


def _step_seconds(
    sampler: DensePublished, num_steps: int, generator: torch.Generator, *, call: bool
) -> float:
    """Return the median time of a step; half of the digits are masked and visible ones show a token."""
    codec = sampler.codec
    tokens = torch.randint(
        codec.vocab_size, (sampler.num_rows, sampler.length), generator=generator, device=sampler.device
    )
    y = codec.encode(tokens)
    hidden = torch.rand(y.shape, generator=generator, device=sampler.device) < 0.5
    y = y.masked_fill(hidden, codec.mask_index)
    sampler.step(y, 0.5, 0.0, generator, call=True)  # warms up, and gives the redraws their probabilities
    seconds = []
    for _ in range(num_steps):
        with timed(sampler.device) as elapsed:
            y_next = sampler.step(y, 0.5, 0.5 / num_steps, generator, call=call)
            torch.equal(y_next, y)
        seconds.append(elapsed.seconds)
    return statistics.median(seconds)
