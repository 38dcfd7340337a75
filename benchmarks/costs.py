"""FLOPs and bytes of both samplers, counted by hand, and the time they predict.

Shapes: B rows, L tokens a row, N grid steps, S digits a token, V tokens, d hidden_size.

FLOPs count a multiplication and an addition as two. Of one block and one token: 2 d 3d for q, k, v, 2 d d for
the output, 2 (2 d 4d) for the MLP, together 24 d^2; attention takes 2 L d for the scores and 2 L d for the
values. So the trunk takes num_blocks (24 d^2 + 4 L d) a token, and the head 2 d V a position. Norms,
activations and modulations are left out: they are bytes, not products. The image network is in `unet_costs`.

The prediction is a roofline without overlap: products at the measured product rate, the sampler's own passes
over the vocabulary at the measured copy bandwidth. It leaves out what neither counts (random numbers,
exponentials, dispatch), so a measured ratio beside it says how much these matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from benchmarks.unet_costs import unet_head_flops, unet_trunk_flops
from prime_core.codec import smallest_base
from prime_core.config import DiTConfig, UNetConfig
from prime_core.schedule import Schedule


@dataclass(frozen=True)
class Cost:
    """Work of one sampling run.

    Attributes:
        num_row_steps: rows of all denoiser calls.
        num_positions: positions that the head and the draw handle.
        trunk_flops: matrix products of the trunk.
        head_flops: matrix products of the head.
        draw_bytes: memory traffic between logits and digits.
    """

    num_row_steps: float
    num_positions: float
    trunk_flops: float
    head_flops: float
    draw_bytes: float

    def predicted_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Return the seconds it takes at the given rates."""
        return (self.trunk_flops + self.head_flops) / flops_per_s + self.draw_bytes / bytes_per_s


def trunk_flops(config: DiTConfig | UNetConfig, num_tokens: float, length: int) -> float:
    """Return the FLOPs of the trunk for ``num_tokens`` tokens in rows of ``length``."""
    if isinstance(config, UNetConfig):
        return unet_trunk_flops(config, num_tokens / length)
    dim = config.hidden_size
    return num_tokens * config.num_blocks * (24 * dim**2 + 4 * length * dim)


def head_flops(config: DiTConfig | UNetConfig, num_positions: float, vocab_size: int) -> float:
    """Return the FLOPs of the output head."""
    if isinstance(config, UNetConfig):
        return unet_head_flops(config, num_positions, vocab_size)
    return num_positions * 2 * config.hidden_size * vocab_size


def dense_cost(
    config: DiTConfig | UNetConfig,
    num_rows: int,
    length: int,
    num_steps: int,
    num_digits: int,
    vocab_size: int,
    num_calls: float | None = None,
) -> Cost:
    """Return the cost of the published sampler.

    The draw of text passes over a position's vocabulary. After a call, the filter copies from a float32 table and
    rewrites the logits for every digit (20 S bytes a token; one digit needs no filter) and softmax reads float32 and
    writes float64 (12). In every step the noise is written (8), its logarithm taken (16), the quotient formed (24)
    and searched (8). That of images reads float32, writes float64 (12) and sums once a digit (8 S); its races over
    the b values of a digit (56 b a digit) are small beside that.

    Args:
        config: the network.
        num_rows: B.
        length: L.
        num_steps: N.
        num_digits: S.
        vocab_size: V.
        num_calls: denoiser calls of the run; None for one in every step.
    """
    calls = float(num_steps if num_calls is None else num_calls)
    called, drawn = num_rows * length * calls, float(num_rows * length * num_steps)
    if isinstance(config, UNetConfig):
        base = smallest_base(vocab_size, num_digits)
        draw_bytes = drawn * (vocab_size * (12 + 8 * num_digits) + 56 * num_digits * base)
    else:
        filter_bytes = 20 * num_digits if num_digits > 1 else 0
        draw_bytes = vocab_size * (called * (filter_bytes + 12) + drawn * 56)
    return Cost(
        num_row_steps=num_rows * calls,
        num_positions=called,
        trunk_flops=trunk_flops(config, called, length),
        head_flops=head_flops(config, called, vocab_size),
        draw_bytes=draw_bytes,
    )


def planned_cost(
    config: DiTConfig | UNetConfig,
    num_rows: int,
    length: int,
    reveal: Tensor,
    num_digits: int,
    vocab_size: int,
    *,
    fused: bool = False,
) -> Cost:
    """Return the expected cost of the reveal plan.

    A row skips a step that reveals none of its L S digits, and the head handles a position in the steps that
    reveal at least one of its S digits. The draw of text reads and writes float32 (8 bytes a token and pass) to
    filter, shift, divide, clamp, exponentiate, threshold and sum, and compares int16 digits (3 S bytes); that of
    images brings the weights into the order of every digit instead (24 S).

    Args:
        config: the network.
        num_rows: B.
        length: L.
        reveal: (N,) probability that a digit is revealed in each step; they sum to 1.
        num_digits: S.
        vocab_size: V.
        fused: the draw is one kernel, which reads the logits twice (12 bytes a token with the head's writing).
    """
    row_steps = num_rows * float((1 - (1 - reveal) ** (length * num_digits)).sum())
    positions = num_rows * length * float((1 - (1 - reveal) ** num_digits).sum())
    per_digit = 24 if isinstance(config, UNetConfig) else 3
    return Cost(
        num_row_steps=row_steps,
        num_positions=positions,
        trunk_flops=trunk_flops(config, row_steps * length, length),
        head_flops=head_flops(config, positions, vocab_size),
        draw_bytes=positions * vocab_size * (12 if fused else per_digit * num_digits + 56),
    )


def reveal_probabilities(schedule: Schedule, num_steps: int) -> Tensor:
    """Return (N,) float64: the probability that a digit is revealed in each step; they sum to 1."""
    alpha = schedule.alpha_t(schedule.time_grid(num_steps))
    return (alpha[1:] - alpha[:-1]) / (alpha[-1] - alpha[0])
