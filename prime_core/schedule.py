"""Noise schedules.

alpha_t is the probability that a sub-token is NOT masked at noise time t; t = 1 is all masked, t = 0 is clean.
Forward process (MDLM, arXiv 2406.07524, eq. 3): each sub-token is masked independently with probability
1 - alpha_t. A schedule gives alpha_t, its derivative, its inverse and the loss weight w(t) = -alpha'_t/(1-alpha_t).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Schedule(ABC):
    """A decreasing map t in [0, 1] -> alpha_t in [0, 1] with alpha_0 = 1."""

    @abstractmethod
    def alpha_t(self, t: Tensor) -> Tensor:
        """Return the probability that a sub-token is visible at time t (same shape as t)."""

    @abstractmethod
    def d_alpha_t(self, t: Tensor) -> Tensor:
        """Return the derivative of alpha_t with respect to t (same shape as t, never positive)."""

    @abstractmethod
    def inverse(self, alpha: Tensor) -> Tensor:
        """Return the t in [0, 1] with alpha_t = alpha; alpha below alpha_1 gives t = 1."""

    def weight(self, t: Tensor) -> Tensor:
        """Return w(t) = -alpha'_t / (1 - alpha_t), the weight of the continuous-time objectives (t > 0)."""
        return -self.d_alpha_t(t) / (1 - self.alpha_t(t))

    def alpha_final(self) -> float:
        """Return alpha_1: the share that the forward process leaves visible at t = 1 (0 for most schedules)."""
        return float(self.alpha_t(torch.ones((), dtype=torch.float64)))

    def visible_share(self, times: Tensor) -> Tensor:
        """Return the share of a row's free digits that ancestral sampling shows at each time: 0 at t = 1, 1 at t = 0.

        Args:
            times: float64 noise times.

        Returns:
            (alpha_t - alpha_1) / (1 - alpha_1), in the shape of ``times``.
        """
        alpha_final = self.alpha_final()
        return ((self.alpha_t(times) - alpha_final) / (1 - alpha_final)).clamp(0, 1)

    def time_grid(self, num_steps: int, eps: float = 0.0) -> Tensor:
        """Return the sampling grid 1 = t_0 > ... > t_N = eps, uniform in t.

        Args:
            num_steps: N, at least 1.
            eps: last time of the grid, in [0, 1). What is masked there is revealed by one more event.

        Returns:
            (N + 1,) float64.

        Raises:
            ValueError: if an argument is out of range.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if not 0 <= eps < 1:
            raise ValueError(f"eps must be in [0, 1), got {eps}")
        return torch.linspace(1.0, eps, num_steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """alpha_t = 1 - (1 - eps) t.

    ``eps = 0`` is the plain linear schedule; the published text models use eps = 1e-3 (MDLM's log-linear
    schedule, so called because its total noise -log(alpha_t) is log-linear in t).
    """

    eps: float = 0.0

    def __post_init__(self) -> None:
        """Check the range of eps."""
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must be in [0, 1), got {self.eps}")

    def alpha_t(self, t: Tensor) -> Tensor:
        """Return 1 - (1 - eps) t."""
        return 1 - (1 - self.eps) * t

    def d_alpha_t(self, t: Tensor) -> Tensor:
        """Return -(1 - eps)."""
        return torch.full_like(t, -(1 - self.eps))

    def inverse(self, alpha: Tensor) -> Tensor:
        """Return (1 - alpha) / (1 - eps), at most 1."""
        return ((1 - alpha) / (1 - self.eps)).clamp(0, 1)


@dataclass(frozen=True)
class PolynomialSchedule(Schedule):
    """alpha_t = (1 - t)^power; the published image models use power 3."""

    power: float = 3.0

    def __post_init__(self) -> None:
        """Check the range of power."""
        if not (math.isfinite(self.power) and self.power > 0):
            raise ValueError(f"power must be positive, got {self.power}")

    def alpha_t(self, t: Tensor) -> Tensor:
        """Return (1 - t)^power."""
        return (1 - t) ** self.power

    def d_alpha_t(self, t: Tensor) -> Tensor:
        """Return -power (1 - t)^(power - 1)."""
        return -self.power * (1 - t) ** (self.power - 1)

    def inverse(self, alpha: Tensor) -> Tensor:
        """Return 1 - alpha^(1/power)."""
        return 1 - alpha.clamp(0, 1) ** (1 / self.power)


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """alpha_t = 1 - cos(pi (1 - t) / 2) (MaskGIT's schedule, as in MD4, arXiv 2406.04329)."""

    def alpha_t(self, t: Tensor) -> Tensor:
        """Return 1 - cos(pi (1 - t) / 2)."""
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def d_alpha_t(self, t: Tensor) -> Tensor:
        """Return -(pi / 2) sin(pi (1 - t) / 2)."""
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def inverse(self, alpha: Tensor) -> Tensor:
        """Return 1 - (2 / pi) arccos(1 - alpha)."""
        return 1 - 2 / math.pi * torch.acos(1 - alpha.clamp(0, 1))
