"""The baseline has the law it claims, so that both samplers are compared on the same task."""

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from benchmarks.dense_published import PUBLISHED_EPS, DensePublished, carry_over_penalties
from prime_core.codec import SubtokenCodec
from prime_core.exact.laws import TokenLaw, dense_ancestral_law
from prime_core.sampling.canvas import digits_canvas
from prime_core.schedule import LinearSchedule

SCHEDULE = LinearSchedule(eps=1e-3)


class StateTable:
    """Random logits for every state of a row and position, looked up for whole batches at once."""

    def __init__(
        self, codec: SubtokenCodec, seed: int = 0, *, slope: float = 0.0, num_states: int = 997
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 1.5 * torch.randn(num_states, codec.vocab_size, generator=generator)
        self.slopes = slope * torch.randn(num_states, codec.vocab_size, generator=generator)
        self.base = codec.base

    def __call__(self, y_t: Tensor, t: Tensor) -> Tensor:
        digits = y_t.flatten(1)
        code = (digits * (self.base + 1) ** torch.arange(digits.shape[1])).sum(-1, keepdim=True)
        index = (code * y_t.shape[1] + 7 * torch.arange(y_t.shape[1])) % len(self.table)
        return self.table[index] + t[:, None, None].float() * self.slopes[index]


def exact_law(
    model: StateTable, codec: SubtokenCodec, length: int, num_steps: int, eps: float = PUBLISHED_EPS
) -> TokenLaw:
    masked = torch.full((length, codec.target_length), codec.mask_index)
    grid = SCHEDULE.time_grid(num_steps, eps)
    return dense_ancestral_law(model, codec, SCHEDULE, grid, digits_canvas(codec, masked))


def p_value(samples: Tensor, law: TokenLaw) -> float:
    """Chi-square of tokens (B, L) against a law; outcomes that are too rare to test share one cell."""
    counts = dict.fromkeys(law, 0)
    for row in samples.tolist():
        counts[tuple(row)] += 1  # a KeyError is a sample that cannot occur
    common = [key for key, p in law.items() if p * len(samples) >= 5]
    observed = [counts[key] for key in common]
    expected = [law[key] * len(samples) for key in common]
    if len(common) < len(law):
        observed.append(len(samples) - sum(observed))
        expected.append(len(samples) - sum(expected))
    return float(chisquare(observed, expected).pvalue)


@pytest.mark.parametrize(
    ("vocab_size", "target_length", "length", "eps"),
    [(3, 1, 2, PUBLISHED_EPS), (3, 2, 2, PUBLISHED_EPS), (7, 3, 1, 0.3)],
)
def test_law_is_that_of_dense_ancestral_sampling(
    vocab_size: int, target_length: int, length: int, eps: float, generator: torch.Generator
) -> None:
    codec = SubtokenCodec(vocab_size, target_length)
    model = StateTable(codec, seed=1)
    sampler = DensePublished(model, codec, SCHEDULE, num_rows=3000, length=length, eps=eps)
    samples = codec.decode(sampler.sample(3, generator).y)
    assert p_value(samples, exact_law(model, codec, length, 3, eps)) > 1e-4
    assert p_value(samples, exact_law(StateTable(codec, seed=2), codec, length, 3, eps)) < 1e-6


def test_digits_of_one_step_share_one_draw(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a grid of one step all digits are revealed together; a draw for each digit is another law."""
    codec = SubtokenCodec(4, 2)
    model = StateTable(codec, seed=3)
    sampler = DensePublished(model, codec, SCHEDULE, num_rows=3000, length=2)
    law = exact_law(model, codec, 2, 1)
    assert p_value(codec.decode(sampler.sample(1, generator).y), law) > 1e-4
    draw = sampler._draw

    def draw_twice(y: Tensor, logits: Tensor | None, noise: torch.Generator) -> Tensor:
        first, second = draw(y, logits, noise), draw(y, None, noise)
        return torch.stack([first[..., 0], second[..., 1]], -1)

    monkeypatch.setattr(sampler, "_draw", draw_twice)
    assert p_value(codec.decode(sampler.sample(1, generator).y), law) < 1e-6


def test_law_survives_the_cache(generator: torch.Generator) -> None:
    codec, num_steps = SubtokenCodec(3, 2), 10
    model = StateTable(codec, seed=3)
    sampler = DensePublished(model, codec, SCHEDULE, num_rows=1, length=1)
    runs = [sampler.sample(num_steps, generator) for _ in range(1000)]
    assert {run.num_calls for run in runs} == {1, 2, 3}  # the first, and one after each step that changed y
    samples = codec.decode(torch.cat([run.y for run in runs])[:, 0])[:, None]
    assert p_value(samples, exact_law(model, codec, 1, num_steps)) > 1e-4


def test_time_conditioned_networks_are_called_in_every_step(generator: torch.Generator) -> None:
    codec, num_steps = SubtokenCodec(3, 2), 6
    model = StateTable(codec, seed=4, slope=2.0)
    sampler = DensePublished(model, codec, SCHEDULE, num_rows=3000, length=1, time_free=False)
    run = sampler.sample(num_steps, generator)
    assert run.num_calls == num_steps
    assert p_value(codec.decode(run.y), exact_law(model, codec, 1, num_steps)) > 1e-4


def test_leftovers_take_one_more_call(generator: torch.Generator) -> None:
    codec = SubtokenCodec(5, 2)
    sampler = DensePublished(StateTable(codec), codec, SCHEDULE, num_rows=50, length=2, eps=0.9)
    run = sampler.sample(2, generator)
    assert run.num_calls == 3
    assert (run.y != codec.mask_index).all()


def test_blocks_of_positions_do_not_show(generator: torch.Generator) -> None:
    """More positions than a block holds, and a last block that is not full."""
    codec = SubtokenCodec(6, 2)
    model = StateTable(codec, seed=5, num_states=1)  # every position of every state has the same law
    sampler = DensePublished(model, codec, SCHEDULE, num_rows=100, length=37)
    samples = codec.decode(sampler.sample(1, generator).y)
    law = exact_law(model, codec, 1, 1)
    assert p_value(samples.reshape(-1, 1), law) > 1e-4
    assert p_value(samples[:, -5:].reshape(-1, 1), law) > 1e-4


def test_penalties_allow_exactly_the_tokens_that_agree() -> None:
    codec = SubtokenCodec(7, 3)
    penalties = carry_over_penalties(codec)
    for y in torch.cartesian_prod(*[torch.arange(codec.base + 1)] * 3):
        total = sum(penalties[digit, value] for digit, value in enumerate(y.tolist()))
        agrees = ((codec.digits == y) | (y == codec.mask_index)).all(-1)
        assert torch.equal(total, torch.where(agrees, 0.0, -torch.inf))


@pytest.mark.parametrize("shape", [{"num_rows": 0, "length": 4}, {"num_rows": 4, "length": 0}])
def test_empty_batches_are_refused(shape: dict[str, int]) -> None:
    codec = SubtokenCodec(3, 2)
    with pytest.raises(ValueError, match="at least 1"):
        DensePublished(StateTable(codec), codec, SCHEDULE, **shape)
