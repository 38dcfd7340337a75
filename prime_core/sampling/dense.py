"""Dense ancestral sampling with a step cache: every row goes through every step of the grid, without a plan.

The law is that of the planned sampler (`prime_core.sampling.sample`). In the step from t to s each masked digit is
revealed with probability (alpha_s - alpha_t) / (1 - alpha_t) (MDLM, arXiv 2406.07524, eq. 7), and the digits of one
token that are revealed together are those of one draw. It is the form that samplers need whose steps depend on values,
and the yardstick of the plan: what a step decides is decided in that step.

A row is evaluated in its first step, and again in a step whose digits differ from those of its last evaluation, unless
nothing is masked any more. So it costs one evaluation, and one more for every (row, step) pair that changes something
but for the last of a row: never fewer than the planned sampler's events.

Noise is a pure function of (seed of the row, position, step and digit, purpose), so a row does not depend on its batch:
digit d of step k has index S k + d for being revealed (purpose PLAN) and S (1 + k) + d for what it becomes (DRAW), the
numbering of digits that are drawn more than once in `prime_core.sampling.draw_settings`.

Shapes: B rows, L tokens, S digits a token, N steps, R positions that change in one step, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.marginal import reveal_digits
from kernels.noise import Purpose, seed_words, uniform
from kernels.reveal import Revealed, reveal_tokens
from kernels.rows import compact_rows
from kernels.token_digits import TokenDigits
from kernels.transfers import HostCopy
from prime_core.codec import SubtokenCodec
from prime_core.models.denoiser import Denoiser, device_of, filled_size
from prime_core.sampling.correctors import step_tables
from prime_core.sampling.settings import SamplingSettings, check_draw
from prime_core.sampling.step_cache import StepCache
from prime_core.sampling.stepper import max_logit_rows
from prime_core.schedule import Schedule


class DenseSamples(NamedTuple):
    """Result of `sample_dense`.

    Attributes:
        y: (B, L, S) int64 on the sampler's device, the digits; not to be used where ``ok`` is False.
        ok: (B,) bool, False for rows whose logits were not finite in some step.
        row_evaluations: rows that the network evaluated.
        num_calls: its calls.
    """

    y: Tensor
    ok: Tensor
    row_evaluations: int
    num_calls: int


@torch.inference_mode()
def sample_dense(
    denoiser: Denoiser,
    codec: SubtokenCodec,
    schedule: Schedule,
    y: Tensor,
    seeds: Sequence[int],
    num_steps: int,
    settings: SamplingSettings,
    *,
    eps: float = 0.0,
    labels: Tensor | None = None,
) -> DenseSamples:
    """Sample the masked digits of a batch of rows of equal length.

    Args:
        denoiser: time-free network in evaluation mode.
        codec: tokens to digits.
        schedule: noise schedule.
        y: (B, L, S) int64, digits in 0..b-1, or b where free.
        seeds: B seeds in 0..2**64-1.
        num_steps: steps N of the grid.
        settings: how tokens are drawn.
        eps: end of the grid in [0, 1); what is still masked there is revealed in one more step.
        labels: (B,) int64, the label of each row; None for networks without labels.

    Raises:
        ValueError: if an argument is out of range, or the network is time-conditioned.
    """
    check_draw(codec, settings.draw)
    if len(seeds) != len(y):
        raise ValueError(f"there must be one seed a row, got {len(seeds)} for {len(y)} rows")
    device = device_of(denoiser)
    cache = StepCache(denoiser, codec.mask_index, None if labels is None else labels.to(device))
    times = schedule.time_grid(num_steps, eps)
    chances = [*step_tables(schedule, times).reveal.tolist(), 1.0]
    words = torch.tensor([seed_words(seed) for seed in seeds], device=device)
    digits = TokenDigits(codec.digits_on(device), codec.mask_index)
    y = y.to(device, copy=True)
    failed = torch.zeros(len(y), dtype=torch.bool, device=device)
    for step, (t, chance) in enumerate(zip(times.tolist(), chances, strict=True)):
        wanted = (y == codec.mask_index).flatten(1).any(1) & ~failed
        num_changed = cache.begin(y, wanted)
        due = _due_digits(y, words, chance, step, codec.mask_index) & wanted[:, None, None]
        places, num_due = compact_rows(due.any(-1).flatten())
        # The only wait of a step: three numbers, behind which no work is queued yet.
        counts = HostCopy(torch.cat([num_changed, num_due, wanted.sum(0, keepdim=True)]))
        changed, places_due, left = counts.wait().tolist()
        if left == 0:
            break
        cache.finish(changed)
        for chunk in places[:places_due].split(max_logit_rows(device)):
            if len(chunk):
                failed |= _reveal(cache, digits, settings, y, due, chunk, words, step, t)
    return DenseSamples(y, ~failed, cache.row_evaluations, cache.num_calls)


def _due_digits(y: Tensor, words: Tensor, chance: float, step: int, mask_index: int) -> Tensor:
    """Return the masked digits (B, L, S) that a step reveals; words (B, 2) are the seeds of the rows."""
    _, length, num_digits = y.shape
    position = torch.arange(length, device=y.device)[:, None].expand_as(y)
    index = (num_digits * step + torch.arange(num_digits, device=y.device)).expand_as(y)
    u = uniform(words[:, None, None].expand(*y.shape, 2), position, index, Purpose.PLAN)
    return (y == mask_index) & (u < chance)


def _reveal(
    cache: StepCache,
    digits: TokenDigits,
    settings: SamplingSettings,
    y: Tensor,
    due: Tensor,
    places: Tensor,
    words: Tensor,
    step: int,
    t: float,
) -> Tensor:
    """Draw the tokens of R places and write their due digits into y (B, L, S); return the rows (B,) that failed.

    Args:
        cache: results of the rows.
        digits: of every token.
        settings: how tokens are drawn.
        y: (B, L, S) int64.
        due: (B, L, S) bool.
        places: (R,) int64, positions of the rows laid end to end.
        words: (B, 2) int64, the `seed_words` of each row.
        step: number of the step.
        t: its noise time.
    """
    num_rows, length, num_digits = y.shape
    count = len(places)
    filled = F.pad(places, (0, filled_size(count) - count))
    logits = cache.denoiser.head(cache.features(filled))[:count]
    row, position = places // length, (places % length)[:, None].expand(count, num_digits)
    index = (num_digits * (1 + step) + torch.arange(num_digits, device=y.device)).expand(count, num_digits)
    u = uniform(words[row, None].expand(count, num_digits, 2), position, index, Purpose.DRAW)
    tokens = y.view(-1, num_digits)
    revealed = _draw(logits, tokens[places], due.view(-1, num_digits)[places], u, digits, settings, t)
    tokens.index_copy_(0, places, revealed.y)
    return torch.zeros(num_rows, device=y.device).index_add_(0, row, (~revealed.finite).float()) > 0


def _draw(
    logits: Tensor,
    y: Tensor,
    due: Tensor,
    u: Tensor,
    digits: TokenDigits,
    settings: SamplingSettings,
    t: float,
) -> Revealed:
    """Draw tokens, or every digit alone, from logits (R, V): y, due and u are (R, S)."""
    count = len(logits)
    temperature = logits.new_full((count,), settings.temperature_at(t))
    top_k = y.new_full((count,), min(settings.top_k, digits.vocab_size))
    top_p = logits.new_full((count,), settings.top_p)
    rows = logits, y, due, digits
    how = temperature, top_k, top_p
    if settings.draw == "marginal":
        return reveal_digits(*rows, u, *how, mask_index=digits.mask_index)
    # The lowest digit that is due numbers the draw.
    lowest = u.gather(1, due.int().argmax(-1, keepdim=True))[:, 0]
    return reveal_tokens(*rows, lowest, *how, mask_index=digits.mask_index)
