"""Optimiser, learning-rate schedule and the moving average of the weights that is served."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.config import TrainConfig


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW over all parameters (published: betas .9/.999, no decay)."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        foreach=True,
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of step 0, 1, ...: a linear rise, constant, a linear fall over the last decay_steps."""
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    fall = min(1.0, (config.steps - step) / (config.decay_steps + 1))
    return config.learning_rate * min(rise, fall)


class ExponentialMovingAverage:
    """Average of the weights: shadow <- shadow + (1 - d) (weight - shadow).

    d = min(decay, (1 + n) / (10 + n)) with warm-up: young averages forget faster. Without it d = decay.

    Attributes:
        shadow: the averaged parameters by name, float32.
        num_updates: n.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, Tensor]], decay: float, *, warmup: bool = True
    ) -> None:
        """Start from the current weights; ``decay`` is in [0, 1)."""
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.shadow = {name: p.detach().clone() for name, p in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take in the weights after one optimiser step."""
        self.num_updates += 1
        young = (1 + self.num_updates) / (10 + self.num_updates)
        decay = min(self.decay, young) if self.warmup else self.decay
        for name, parameter in parameters:
            self.shadow[name].lerp_(parameter.detach(), 1 - decay)
