"""Curves over noise time: the temperature of a step, and a warp of the time grid.

The published image sampler (MDM-Prime, arXiv 2505.18495) writes both in a clock that runs from 0 (all masked) to
1 (clean): tau = 1 - t. Here t is the noise time as everywhere else, so t = 1 is all masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TEMPERATURE = 100.0
MAX_POWER = 100.0
MAX_WARP_SCALE = 100.0


@dataclass(frozen=True, slots=True)
class TemperatureCurve:
    """The temperature of a step as a function of its time: T(t) = scale (1 - t)^power + offset.

    Published CIFAR-10 settings are (-0.2, 2, 1): 1 while all is masked, 0.8 at the end. The time is that of the step's
    denoiser call, after any `TimeWarp`.

    Attributes:
        scale: a; finite.
        power: n in [0, 100].
        offset: c; T must stay in [0, 100], so both c and a + c lie there (for power 0 only a + c).
    """

    scale: float
    power: float
    offset: float

    def __post_init__(self) -> None:
        """Check the range of the curve.

        Raises:
            ValueError: if a parameter is no finite number, or the temperature leaves [0, 100] anywhere.
        """
        check_parameters("temperature", scale=self.scale, power=self.power, offset=self.offset)
        if not 0 <= self.power <= MAX_POWER:
            raise ValueError(f"temperature.power must be in [0, {MAX_POWER:g}], got {self.power:g}")
        # T is monotone in t, so its ends bound it.
        for t in (1.0, 0.0):
            value = self._raw(t)
            if not 0 <= value <= MAX_TEMPERATURE:
                raise ValueError(
                    f"temperature is {value:g} at t = {t:g}, but must stay in [0, {MAX_TEMPERATURE:g}]; "
                    "change temperature.scale or temperature.offset"
                )

    def at(self, t: float) -> float:
        """Return the temperature at noise time t in [0, 1]."""
        return min(max(self._raw(t), 0.0), MAX_TEMPERATURE)  # rounding may cross an end by an ulp

    def _raw(self, t: float) -> float:
        return float(self.scale * (1 - t) ** self.power + self.offset)


@dataclass(frozen=True, slots=True)
class TimeWarp:
    """A warp of the time grid: t -> scale t^power - offset, clipped to [0, 1].

    In the published clock tau -> 1 - scale (1 - tau)^power + offset. With power > 1 the steps near the clean end are
    the shorter ones. The first time of a warped grid is always 1, where a row starts. Where the last one is not 0,
    what is still masked there is revealed in one more event, as with ``eps``.

    (1, 1, 0) is the identity. (1, 0, 0) is also taken as the identity: these are the published defaults, which mean
    "off" there; read as a formula they would make the time constant.

    Attributes:
        scale: a in (0, 100].
        power: n in (0, 100], or 0 in (1, 0, 0).
        offset: c > -1, so that the grid leaves t = 1, and below ``scale``, so that it does not jump to 0 at once.
    """

    scale: float = 1.0
    power: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming the parameter and its range.
        """
        check_parameters("warp", scale=self.scale, power=self.power, offset=self.offset)
        if self.is_identity:
            return
        if not 0 < self.scale <= MAX_WARP_SCALE:
            raise ValueError(f"warp.scale must be in (0, {MAX_WARP_SCALE:g}], got {self.scale:g}")
        if not 0 < self.power <= MAX_POWER:
            raise ValueError(
                f"warp.power must be in (0, {MAX_POWER:g}], got {self.power:g}: 0 makes every time the same "
                "(only scale 1, power 0, offset 0 is accepted: no warp)"
            )
        if not -1 < self.offset < self.scale:
            raise ValueError(
                f"warp.offset must lie between -1 and warp.scale ({self.scale:g}), got {self.offset:g}: the "
                "grid would never leave t = 1, or be at t = 0 from the start"
            )

    @property
    def is_identity(self) -> bool:
        """Whether the grid stays as it is."""
        return (self.scale, self.power, self.offset) in ((1, 1, 0), (1, 0, 0))

    def apply(self, times: Tensor) -> Tensor:
        """Warp a time grid.

        Args:
            times: (N + 1,) float64, 1 = t_0 > ... > t_N.

        Returns:
            (N + 1,) float64: 1 = t_0 >= ... >= t_N, all in [0, 1]. Steps of length zero can occur at both ends; nothing
            is revealed in them.
        """
        if self.is_identity:
            return times
        warped = (self.scale * times**self.power - self.offset).clamp(0, 1)
        return torch.cat([torch.ones_like(times[:1]), warped[1:]])


def check_parameters(curve: str, **parameters: float) -> None:
    """Raise ValueError unless every parameter of a curve is a finite number (a bool is none)."""
    for name, value in parameters.items():
        if not is_number(value):
            raise ValueError(f"{curve}.{name} must be a finite number")


def is_number(value: object) -> bool:
    """Return whether a value is a finite int or float; a bool is no number here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
