"""Likelihood of data under the sampler: the valid bound, with the coded loss beside it.

The bound of the sampler that starts all masked and reveals one digit at a time (N -> infinity) is

    nelbo = int_0^1 dv / v  E[ sum over masked digits of -log p(y_0^ij | y) ],   each digit masked with prob. v.

Grouping the integral by the NUMBER n of masked digits, with M = L S digits in all,

    int_0^1 dv / v Binomial(n | M, v) f = f / n,   and v given n is Beta(n, M - n + 1),

so nelbo = sum_n (1 / n) E_{|masked| = n}[...] exactly. Drawing n uniformly from 1..M with weight M / n has no
cut-off at small t (a cut-off would silently drop part of the bound) and finite variance (weighting by 1 / v has
not). The noise schedule only enters through t(v), which time-free models do not see.

Shapes: B rows, L tokens a row, S digits a token, V vocab_size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear_nll import Targets, linear_subtoken_nll
from kernels.nll import SubtokenNLL, revealed_nll, subtoken_nll
from prime_core.codec import SubtokenCodec
from prime_core.models.denoiser import Denoiser
from prime_core.schedule import Schedule


class Likelihood(NamedTuple):
    """Monte-Carlo estimates for B rows, nats per row.

    Attributes:
        nelbo: (B,) float64, unbiased for an upper bound of -log p(x_0): may be called a likelihood bound.
        coded_loss: (B,) float64, unbiased for the published loss; NOT a bound for target_length > 1.
    """

    nelbo: Tensor
    coded_loss: Tensor


@torch.inference_mode()
def estimate_likelihood(
    denoiser: Denoiser,
    codec: SubtokenCodec,
    schedule: Schedule,
    x_0: Tensor,
    *,
    generator: torch.Generator,
    num_draws: int = 1,
    batch_rows: int | None = None,
    chunk_rows: int = 1024,
    labels: Tensor | None = None,
) -> Likelihood:
    """Estimate `nelbo` and `coded_loss` of rows from the same masks.

    The numbers of masked digits are stratified over rows and draws together, which lowers the variance of the mean
    and leaves each row unbiased.

    Args:
        denoiser: the network.
        codec: tokens <-> digits.
        schedule: maps the masking probability to t for time-conditioned models.
        x_0: (B, L) tokens.
        generator: source of the masks.
        num_draws: masks per row, at least 1.
        batch_rows: rows that the network sees at a time, at least 1; None for all. The masks do not depend on it.
        chunk_rows: tokens whose logits exist at the same time.
        labels: (B,) int64, for networks with labels.

    Returns:
        Likelihood.

    Raises:
        ValueError: if ``num_draws`` or ``batch_rows`` is below 1 or x_0 is empty.
    """
    size = _checked_size(x_0, num_draws, batch_rows)
    repeated = x_0.repeat_interleave(num_draws, 0)
    labels = None if labels is None else labels.repeat_interleave(num_draws, 0)
    y_0 = codec.encode(repeated)
    num_digits = y_0[0].numel()
    counts = _stratified_counts(len(y_0), num_digits, generator)
    y_t = _mask_exactly(y_0, counts, generator, codec.mask_index)
    t = _time_given_count(counts, num_digits, schedule, generator).to(x_0.device)
    parts = [
        _masked_nll(denoiser, codec, y_t[rows], repeated[rows], t[rows], chunk_rows, _labels_of(labels, rows))
        for rows in _slices(len(y_t), size)
    ]
    nll = [torch.cat(part) for part in zip(*parts, strict=True)]
    weight = (num_digits / counts.double()).to(x_0.device)
    per_row = [(part.double() * weight).view(len(x_0), num_draws).mean(1) for part in nll]
    return Likelihood(nelbo=per_row[1], coded_loss=per_row[0])


@torch.inference_mode()
def estimate_grid_nelbo(
    denoiser: Denoiser,
    codec: SubtokenCodec,
    schedule: Schedule,
    x_0: Tensor,
    num_steps: int,
    *,
    generator: torch.Generator,
    num_draws: int = 1,
    eps: float = 0.0,
    batch_rows: int | None = None,
    chunk_rows: int = 1024,
    labels: Tensor | None = None,
) -> Tensor:
    """Estimate `grid_nelbo`, the bound of exactly the sampler that runs ``num_steps`` steps.

    Digits of one token revealed in the same step share one draw, so the chain pays -log p(those digits | y) once:

        grid_nelbo = E_plan sum_k sum_i -log p(digits of i revealed in step k | y_{t_k}).

    One step is drawn for every row and draw, stratified and with a probability proportional to how much of the row
    it reveals, so the weight is bounded.

    Args:
        denoiser: the network.
        codec: tokens <-> digits.
        schedule: gives the grid.
        x_0: (B, L) tokens.
        num_steps: N, at least 1.
        generator: source of steps and masks.
        num_draws: steps per row, at least 1.
        eps: last time of the grid; what is masked there is revealed in one more step.
        batch_rows: rows that the network sees at a time, at least 1; None for all. Steps and masks do not depend on it.
        chunk_rows: tokens whose logits exist at the same time.
        labels: (B,) int64, for networks with labels.

    Returns:
        (B,) float64, nats per row.

    Raises:
        ValueError: if an argument is out of range or x_0 is empty.
    """
    size = _checked_size(x_0, num_draws, batch_rows)
    repeated = x_0.repeat_interleave(num_draws, 0)
    labels = None if labels is None else labels.repeat_interleave(num_draws, 0)
    y_0 = codec.encode(repeated)
    times = schedule.time_grid(num_steps, eps)
    # Of what is masked at t = 1: at each grid time, then 0 at the end.
    masked_share = torch.cat([1 - schedule.visible_share(times), torch.zeros(1, dtype=torch.float64)])
    step_share = -masked_share.diff()  # probability that a digit is revealed in step k, sums to 1
    steps = _stratified_steps(len(y_0), step_share, generator)
    levels = torch.rand(y_0.shape, generator=generator, dtype=torch.float64).to(x_0.device)
    start = masked_share[steps].to(x_0.device)[:, None, None]
    end = masked_share[steps + 1].to(x_0.device)[:, None, None]
    y_t = torch.where(levels < start, torch.full_like(y_0, codec.mask_index), y_0)
    y_next = torch.where(levels < end, torch.full_like(y_0, codec.mask_index), y_0)
    t = times[steps].to(x_0.device)
    parts = [
        _revealed_nll(denoiser, codec, y_t[rows], y_next[rows], t[rows], chunk_rows, _labels_of(labels, rows))
        for rows in _slices(len(y_t), size)
    ]
    nll = torch.cat(parts)
    weight = (1 / step_share[steps]).to(x_0.device)
    return (nll * weight).view(len(x_0), num_draws).mean(1)


def _checked_size(x_0: Tensor, num_draws: int, batch_rows: int | None) -> int:
    """Return how many masks the network sees at a time.

    Raises:
        ValueError: if a number is below 1 or x_0 is empty.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    if batch_rows is not None and batch_rows < 1:
        raise ValueError(f"batch_rows must be at least 1, got {batch_rows}")
    if x_0.numel() == 0:
        raise ValueError("x_0 holds no tokens")
    return num_draws * (len(x_0) if batch_rows is None else batch_rows)


def _slices(num_rows: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, num_rows, size)]


def _labels_of(labels: Tensor | None, rows: slice) -> Tensor | None:
    return None if labels is None else labels[rows]


def masked_counts(levels: Tensor, num_digits: int) -> Tensor:
    """Return numbers of masked digits, uniform on 1..M where levels are uniform.

    Args:
        levels: (...) float64 in [0, 1).
        num_digits: M.

    Returns:
        (...) int64 in 1..M.
    """
    return (levels * num_digits).long().clamp_max(num_digits - 1) + 1


def time_of_masking(v: Tensor, schedule: Schedule) -> Tensor:
    """Return the noise time t(v) at which the share v of what is masked at t = 1 is masked.

    Args:
        v: (...) float64 in [0, 1].
        schedule: noise schedule.

    Returns:
        (...) float64 in [0, 1].
    """
    return schedule.inverse(1 - v * (1 - schedule.alpha_final()))


def _stratified(num_rows: int, generator: torch.Generator) -> Tensor:
    """Uniform on [0, 1) for each row, evenly spread over the rows, in random order: (num_rows,) float64."""
    shifts = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    strata = (torch.arange(num_rows) + shifts) / num_rows
    return strata[torch.randperm(num_rows, generator=generator)]


def _stratified_counts(num_rows: int, num_digits: int, generator: torch.Generator) -> Tensor:
    """Uniform on 1..num_digits for each row, evenly spread over the rows: (num_rows,) int64."""
    return masked_counts(_stratified(num_rows, generator), num_digits)


def _stratified_steps(num_rows: int, step_share: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a step for each row, evenly spread over the rows: (num_rows,) int64.

    Args:
        num_rows: number of rows.
        step_share: (N + 1,) float64, the probability of every step.
        generator: source of the draws.
    """
    last = int(step_share.nonzero().max())
    index: Tensor = torch.searchsorted(step_share.cumsum(0), _stratified(num_rows, generator), right=True)
    return index.clamp_max(last)


def _mask_exactly(y_0: Tensor, counts: Tensor, generator: torch.Generator, mask_index: int) -> Tensor:
    """Mask a uniformly drawn set of counts[row] digits in each row of y_0 (B, L, S)."""
    scores = torch.rand(len(y_0), y_0[0].numel(), generator=generator, dtype=torch.float64)
    ranks = scores.argsort(1).argsort(1)
    masked = (ranks < counts[:, None]).view(y_0.shape).to(y_0.device)
    return torch.where(masked, torch.full_like(y_0, mask_index), y_0)


def _time_given_count(
    counts: Tensor, num_digits: int, schedule: Schedule, generator: torch.Generator
) -> Tensor:
    """Draw the masking probability v ~ Beta(n, M - n + 1), the n-th smallest of M uniforms, and return t(v)."""
    v = torch.stack(
        [
            torch.rand(num_digits, generator=generator, dtype=torch.float64).kthvalue(int(n)).values
            for n in counts
        ]
    )
    return time_of_masking(v, schedule)


def _masked_nll(
    denoiser: Denoiser,
    codec: SubtokenCodec,
    y_t: Tensor,
    x_0: Tensor,
    t: Tensor,
    chunk_rows: int,
    labels: Tensor | None,
) -> SubtokenNLL:
    """Sum the token negative log-likelihoods of each row: SubtokenNLL of (B,) float32."""
    num_rows, length = x_0.shape
    y_packed, x_packed = y_t.flatten(0, 1), x_0.flatten()
    positions = (y_packed == codec.mask_index).any(-1).nonzero().squeeze(-1)
    features = denoiser.features(y_packed, [length] * num_rows, t, positions, labels)
    digits = codec.digits_on(x_0.device)
    y_masked, x_masked = y_packed[positions], x_packed[positions]
    if (head := denoiser.linear_head) is not None:
        targets = Targets(y_masked, x_masked, digits, codec.mask_index)
        nll = linear_subtoken_nll(features, head, targets, chunk_rows=chunk_rows)
    else:
        chunks = zip(*(part.split(chunk_rows) for part in (features, y_masked, x_masked)), strict=True)
        parts = [subtoken_nll(denoiser.head(f), y, x, digits, codec.mask_index) for f, y, x in chunks]
        nll = SubtokenNLL(*(torch.cat(part) for part in zip(*parts, strict=True)))
    totals = [nll_sum.new_zeros(num_rows).index_add_(0, positions // length, nll_sum) for nll_sum in nll]
    return SubtokenNLL(*totals)


def _revealed_nll(
    denoiser: Denoiser,
    codec: SubtokenCodec,
    y_t: Tensor,
    y_next: Tensor,
    t: Tensor,
    chunk_rows: int,
    labels: Tensor | None,
) -> Tensor:
    """Sum over tokens of -log p(digits revealed between y_t and y_next | y_t): (B,) float64."""
    num_rows, length, _ = y_t.shape
    before, after = y_t.flatten(0, 1), y_next.flatten(0, 1)
    positions = (before != after).any(-1).nonzero().squeeze(-1)
    totals = torch.zeros(num_rows, dtype=torch.float64, device=y_t.device)
    if not len(positions):
        return totals
    features = denoiser.features(before, [length] * num_rows, t, positions, labels)
    digits = codec.digits_on(y_t.device)
    for chunk, where in zip(features.split(chunk_rows), positions.split(chunk_rows), strict=True):
        nll = revealed_nll(denoiser.head(chunk), before[where], after[where], digits, codec.mask_index)
        totals.index_add_(0, where // length, nll.double())
    return totals
