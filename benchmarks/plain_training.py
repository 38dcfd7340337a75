"""A training step as one would first write it: the baseline of `prime-bench train`.

Full logits (B, L, V) of every position, the tokens that contradict visible digits set to -inf with masked_fill, then
F.cross_entropy. Optimiser, gradient clipping, average and autocast are the trainer's own, so that only the loss and its
backward pass differ.

Shapes: B rows, L tokens a row, S digits a token, V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from prime_core.codec import SubtokenCodec
from prime_core.corruption import antithetic_times, mask_subtokens
from prime_core.models.dit import DiT
from prime_core.schedule import Schedule
from training.config import TrainConfig
from training.optim import ExponentialMovingAverage, build_optimizer


class PlainLoop:
    """A network, its optimiser and its average, trained step by step."""

    def __init__(self, config: TrainConfig, model: DiT, schedule: Schedule, codec: SubtokenCodec) -> None:
        """Take the settings of a run and a network of its own."""
        self.config, self.model, self.schedule, self.codec = config, model, schedule, codec
        self.optimizer = build_optimizer(config, model)
        self.ema = ExponentialMovingAverage(
            model.named_parameters(), config.ema_decay, warmup=config.ema_warmup
        )
        self.device = next(model.parameters()).device
        self._digits = codec.digits.to(self.device)

    def train_step(self, x_0: Tensor, generator: torch.Generator) -> float:
        """Take one optimiser step on tokens x_0 (B, L) and return the loss in nats per token.

        Args:
            x_0: (B, L) int64, on the CPU, as the trainer's data comes.
            generator: of noise times and masks, on the CPU.
        """
        t = antithetic_times(len(x_0), generator, self.config.eps)
        uniforms = torch.rand(*x_0.shape, self.codec.target_length, generator=generator)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        bfloat16 = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            loss = self.loss(x_0.to(self.device), t.to(self.device), uniforms.to(self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.ema.update(self.model.named_parameters())
        return float(loss.detach())

    def loss(self, x_0: Tensor, t: Tensor, uniforms: Tensor) -> Tensor:
        """Return the published loss: w(t) times the cross-entropy of the tokens given their visible digits."""
        y_t = mask_subtokens(
            self.codec.encode(x_0), self.schedule.alpha_t(t), uniforms, self.codec.mask_index
        )
        logits = self.model(y_t).masked_fill(self._contradicting(y_t), -torch.inf)
        nll = F.cross_entropy(logits.flatten(0, 1), x_0.flatten(), reduction="none").view_as(x_0)
        return (nll * self.schedule.weight(t).float()[:, None]).sum() / x_0.numel()

    def _contradicting(self, y_t: Tensor) -> Tensor:
        """Return which tokens (B, L, V) the visible digits of y_t (B, L, S) rule out."""
        result = torch.zeros(*y_t.shape[:2], self.codec.vocab_size, dtype=torch.bool, device=y_t.device)
        for digit in range(y_t.shape[-1]):
            column = y_t[..., digit, None]
            result |= (column != self.codec.mask_index) & (column != self._digits[:, digit])
        return result
