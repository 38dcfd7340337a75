"""Drawing digits alone: the marginal laws, their tails, independence, failures, neighbours."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kernels.marginal import reveal_digits
from kernels.noise import Purpose, uniform
from kernels.reveal import Revealed, reveal_tokens
from prime_core.codec import SubtokenCodec
from prime_core.exact_tokens import digit_laws, independent
from prime_core.settings import SamplingSettings
from tests.chi_square import p_value

SETTINGS = [
    SamplingSettings(),
    SamplingSettings(temperature=0.6),
    SamplingSettings(temperature=0.0),
    SamplingSettings(top_k=3),
    SamplingSettings(top_p=0.7),
    SamplingSettings(temperature=1.7, top_k=5, top_p=0.8),
]


def draws_u(num_draws: int, num_digits: int) -> Tensor:
    index = torch.arange(num_draws)[:, None].expand(-1, num_digits)
    return uniform(3, index, torch.arange(num_digits).expand_as(index), Purpose.DRAW)


def reveal(
    codec: SubtokenCodec,
    logits: Tensor,
    y: Tensor,
    u: Tensor,
    settings: SamplingSettings | None = None,
    due: Tensor | None = None,
) -> Revealed:
    """All rows with the same settings; everything masked is due unless given."""
    settings = SamplingSettings() if settings is None else settings
    ones = torch.ones(len(y))
    return reveal_digits(
        logits,
        y,
        y == codec.mask_index if due is None else due,
        codec.digits,
        u,
        ones * settings.temperature_at(1.0),
        torch.full((len(y),), settings.top_k),
        ones * settings.top_p,
        mask_index=codec.mask_index,
    )


def permuted_codec(vocab_size: int, target_length: int) -> SubtokenCodec:
    permutation = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))
    return SubtokenCodec(vocab_size, target_length, permutation)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("target_length", [1, 2, 4])
def test_quantiles_follow_the_exact_marginals(settings: SamplingSettings, target_length: int) -> None:
    codec = permuted_codec(16, target_length)
    logits = 2 * torch.randn(16, generator=torch.Generator().manual_seed(2))
    laws = digit_laws(codec, logits.tolist(), settings)
    u = (torch.arange(97) + 0.5).double() / 97
    for digit, law in enumerate(laws):
        edges = torch.tensor([law.get(value, 0.0) for value in range(codec.base)]).double().cumsum(0)
        quantiles = u[(u[:, None] - edges).abs().amin(-1) > 1e-5]
        y = torch.full((len(quantiles), target_length), codec.mask_index)
        each = torch.full((len(quantiles), target_length), 0.5).double()
        each[:, digit] = quantiles
        drawn = reveal(codec, logits.expand(len(quantiles), -1), y, each, settings)
        assert bool(drawn.finite.all())
        assert drawn.y[:, digit].tolist() == torch.searchsorted(edges, quantiles, right=True).tolist()


@pytest.mark.parametrize("settings", SETTINGS[:2] + SETTINGS[-1:])
def test_digits_are_independent_and_visible_ones_do_not_matter(settings: SamplingSettings) -> None:
    codec = permuted_codec(27, 3)
    logits = 2 * torch.randn(27, generator=torch.Generator().manual_seed(2)).expand(4000, -1)
    y = torch.tensor([codec.mask_index, 2, codec.mask_index]).expand(4000, -1)
    laws = digit_laws(codec, logits[0].tolist(), settings)
    law = independent([laws[0], {2: 1.0}, laws[2]])
    drawn = reveal(codec, logits, y, draws_u(4000, 3), settings).y
    assert p_value([tuple(digits) for digits in drawn.tolist()], law) > 1e-4


def test_it_is_told_apart_from_the_draw_of_a_token() -> None:
    """Codes 00 and 11 only: a token has equal digits; digits drawn alone are equal half of the time."""
    codec = SubtokenCodec(4, 2)
    logits = torch.tensor([0.5, 0.0, 0.0, 0.5]).log().expand(2000, -1)
    y = torch.full((2000, 2), codec.mask_index)
    drawn = reveal(codec, logits, y, draws_u(2000, 2)).y
    assert p_value([tuple(digits) for digits in drawn.tolist()], _uniform_pairs()) > 1e-4
    assert 900 < int((drawn[:, 0] == drawn[:, 1]).sum()) < 1100


def _uniform_pairs() -> dict[tuple[int, ...], float]:
    return dict.fromkeys(itertools.product((0, 1), repeat=2), 0.25)


def test_one_digit_per_token_is_the_draw_of_the_token() -> None:
    codec = SubtokenCodec(300, 1)
    logits = torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    y = torch.full((500, 1), codec.mask_index)
    u, ones, zeros = draws_u(500, 1), torch.ones(500), torch.zeros(500, dtype=torch.int64)
    alone = reveal(codec, logits, y, u).y
    token = reveal_tokens(logits, y, y == 300, codec.digits, u[:, 0], ones, zeros, ones, mask_index=300).y
    assert torch.equal(alone, token)


def test_a_rare_digit_has_its_share_of_the_uniforms() -> None:
    codec = SubtokenCodec(256, 2)
    logits = torch.zeros(256)
    logits[codec.digits[:, 1] == 7] = math.log(1e-6)
    u = torch.full((4, 2), 0.5).double()
    start, share = 7 / (15 + 1e-6), 1e-6 / (15 + 1e-6)
    u[:, 1] = torch.tensor([start - share, start + 0.25 * share, start + 0.75 * share, start + 2 * share])
    drawn = reveal(codec, logits.expand(4, -1), torch.full((4, 2), 16), u).y
    assert drawn[:, 1].tolist() == [6, 7, 7, 8]


def test_only_due_digits_are_written() -> None:
    codec = SubtokenCodec(64, 3)
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    y = torch.full((50, 3), codec.mask_index)
    due = torch.tensor([True, False, True]).expand(50, -1)
    part, whole = (reveal(codec, logits, y, draws_u(50, 3), due=d).y for d in (due, torch.ones_like(due)))
    assert torch.equal(part[:, [0, 2]], whole[:, [0, 2]])
    assert bool((part[:, 1] == codec.mask_index).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_row_without_finite_logits_fails_alone(bad: float | None, settings: SamplingSettings) -> None:
    codec = SubtokenCodec(16, 2)
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    y = torch.full((5, 2), codec.mask_index)
    good = reveal(codec, logits, y, draws_u(5, 2), settings)
    for row in (1, 3):
        logits[row, slice(None) if bad is None else slice(7, 8)] = -math.inf if bad is None else bad
    revealed = reveal(codec, logits, y, draws_u(5, 2), settings)
    assert revealed.finite.tolist() == [True, False, True, False, True]
    assert torch.equal(revealed.y[[0, 2, 4]], good.y[[0, 2, 4]])
    assert torch.equal(revealed.y[[1, 3]], y[[1, 3]])


def test_a_row_is_bitwise_independent_of_its_neighbours_and_inputs_are_left_alone() -> None:
    codec = SubtokenCodec(256, 2)
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(6, 256, generator=generator)
    y = torch.full((6, 2), 16)
    due = torch.tensor([[True, True], [True, False], [False, True]] * 2)
    temperature, top_k = torch.tensor([1.0, 0.0, 0.7] * 2), torch.tensor([0, 9, 0, 40, 0, 0])
    arguments = [logits, y, due, draws_u(6, 2), temperature, top_k, torch.tensor([1.0, 0.9, 0.5] * 2)]
    before = [part.clone() for part in arguments]

    def run(rows: list[int]) -> Tensor:
        logits, y, due, *rest = (part[rows] for part in arguments)
        return reveal_digits(logits, y, due, codec.digits, *rest, mask_index=16).y

    together = run(list(range(6)))
    assert all(torch.equal(run([row])[0], together[row]) for row in range(6))
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_codes_without_a_token_are_refused() -> None:
    codec = SubtokenCodec(50, 2)  # 8**2 = 64 codes
    with pytest.raises(ValueError, match=r"8\*\*2 codes, but 50 tokens"):
        reveal(codec, torch.zeros(1, 50), torch.full((1, 2), 8), draws_u(1, 2))
