"""Drawing tokens: the law of one row, tails, truncation, failures, independence of neighbours."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.carry_over import contradicts
from kernels.noise import Purpose, uniform
from kernels.reveal import Revealed, reveal_tokens
from kernels.truncate import NUM_CANDIDATES
from prime_core.codec import SubtokenCodec
from prime_core.exact_tokens import token_law
from prime_core.stepper import SamplingSettings
from tests.chi_square import p_value


def draws_u(num_draws: int, seed: int = 3) -> Tensor:
    index = torch.arange(num_draws)
    return uniform(seed, index, torch.zeros_like(index), Purpose.DRAW)


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
    return reveal_tokens(
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


def tokens_of(codec: SubtokenCodec, revealed: Revealed) -> list[int]:
    assert bool(revealed.finite.all())
    return codec.decode(revealed.y).tolist()


SETTINGS = [
    SamplingSettings(),
    SamplingSettings(temperature=0.6),
    SamplingSettings(temperature=0.0),
    SamplingSettings(top_k=3),
    SamplingSettings(top_k=1),
    SamplingSettings(top_k=10**9),
    SamplingSettings(top_p=0.7),
    SamplingSettings(top_p=1e-9),
    SamplingSettings(temperature=1.7, top_k=5, top_p=0.8),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("visible", [(None, None), (1, None), (None, 2)])
def test_quantiles_follow_the_exact_law(settings: SamplingSettings, visible: tuple[int | None, ...]) -> None:
    codec = SubtokenCodec(11, 2, torch.randperm(11, generator=torch.Generator().manual_seed(1)))
    y_row = torch.tensor([codec.mask_index if digit is None else digit for digit in visible])
    logits = 2 * torch.randn(11, generator=torch.Generator().manual_seed(2))
    law = token_law(codec, logits.tolist(), tuple(y_row.tolist()), settings)
    # Tokens come in the order of their ids, so the token at quantile u is known but at the edges.
    edges = torch.tensor(law, dtype=torch.float64).cumsum(0)
    u = (torch.arange(997) + 0.5).double() / 997
    u = u[(u[:, None] - edges).abs().amin(-1) > 1e-5]
    drawn = tokens_of(codec, reveal(codec, logits.expand(len(u), -1), y_row.expand(len(u), -1), u, settings))
    assert drawn == [int(torch.searchsorted(edges, value, right=True)) for value in u]


def test_tails_of_one_in_a_million_by_chi_square() -> None:
    """A thousand tokens of probability 1e-6 around two common ones; draws of the rare ones are counted in tens."""
    vocab_size, num_draws, chunk = 1002, 100_000, 4_000
    codec = SubtokenCodec(vocab_size, 1)
    probabilities = torch.full((vocab_size,), 1e-6)
    probabilities[[300, 700]] = torch.tensor([0.6, 0.399])
    cell = torch.arange(vocab_size) // 100
    cell[[300, 700]] = torch.tensor([100, 200])
    y = torch.full((chunk, 1), codec.mask_index)
    u = draws_u(num_draws)
    drawn = torch.cat(
        [reveal(codec, probabilities.log().expand(chunk, -1), y, part).y[:, 0] for part in u.split(chunk)]
    )
    law = {c: float(probabilities[cell == c].double().sum()) for c in cell.unique().tolist()}
    assert int((cell[drawn] < 100).sum()) > 60
    assert p_value(cell[drawn].tolist(), law) > 1e-4


def test_a_rare_token_has_its_exact_share_of_the_uniforms_in_a_large_vocabulary() -> None:
    vocab_size, rare = 50257, 40_001
    codec = SubtokenCodec(vocab_size, 4)
    logits = torch.zeros(vocab_size)
    logits[rare] = math.log(1e-3)  # about 2e-8 of the mass, between its neighbours
    y = torch.full((4, 4), codec.mask_index)
    start = rare / (vocab_size - 1 + 1e-3)
    share = 1e-3 / (vocab_size - 1 + 1e-3)
    u = torch.tensor(
        [start - share, start + 0.25 * share, start + 0.75 * share, start + 2 * share], dtype=torch.float64
    )
    assert tokens_of(codec, reveal(codec, logits.expand(4, -1), y, u)) == [rare - 1, rare, rare, rare + 1]


def test_first_and_last_uniform_never_draw_an_excluded_token() -> None:
    for vocab_size in (2, 255, 256, 257, 700):
        codec = SubtokenCodec(vocab_size, 1)
        logits = torch.full((2, vocab_size), -torch.inf)
        logits[:, [vocab_size // 3, vocab_size // 2]] = 0.3
        y = torch.full((2, 1), codec.mask_index)
        u = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
        assert tokens_of(codec, reveal(codec, logits, y, u)) == [vocab_size // 3, vocab_size // 2]


def test_only_due_digits_are_written_and_they_share_one_draw() -> None:
    codec = SubtokenCodec(1000, 3)
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    y = torch.full((200, 3), codec.mask_index)
    due = torch.tensor([True, False, True]).expand(200, -1)
    part, whole = (reveal(codec, logits, y, draws_u(200), due=d).y for d in (due, torch.ones_like(due)))
    assert torch.equal(part[:, [0, 2]], whole[:, [0, 2]])
    assert bool((part[:, 1] == codec.mask_index).all())


def test_every_draw_agrees_with_the_visible_digits_and_is_a_token() -> None:
    codec = SubtokenCodec(50, 3)  # 4**3 = 64 codes, 14 of them no token
    y = codec.encode(torch.arange(50)).repeat(40, 1)
    generator = torch.Generator().manual_seed(4)
    y[torch.rand(y.shape, generator=generator) < 0.5] = codec.mask_index
    logits = torch.randn(2000, 50, generator=generator)
    drawn = reveal(codec, logits, y, draws_u(2000))
    assert len(tokens_of(codec, drawn)) == 2000
    assert bool((drawn.y == y)[y != codec.mask_index].all())


def test_contradicts_is_the_digit_comparison() -> None:
    codec = SubtokenCodec(50, 3)
    y = torch.tensor([[4, 4, 4], [1, 4, 4], [4, 2, 3], [3, 0, 1]])
    expected = [
        [any(a not in (4, b) for a, b in zip(row, full, strict=True)) for full in codec.digits.tolist()]
        for row in y.tolist()
    ]
    assert contradicts(y, codec.digits, 4).tolist() == expected


def test_top_k_keeps_exactly_k_of_equals_the_lowest_ids() -> None:
    codec = SubtokenCodec(600, 2)
    y = torch.full((4000, 2), codec.mask_index)
    logits = torch.zeros(4000, 600)
    logits[:, 500] = 1.0
    drawn = set(tokens_of(codec, reveal(codec, logits, y, draws_u(4000), SamplingSettings(top_k=4))))
    assert drawn == {0, 1, 2, 500}


def test_top_p_keeps_the_token_that_crosses() -> None:
    codec = SubtokenCodec(4, 1)
    y = torch.full((1000, 1), codec.mask_index)
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(1000, -1)
    for top_p, kept in ((0.45, {1}), (0.55, {1, 3}), (0.74, {1, 3}), (0.76, {1, 2, 3}), (0.95, {0, 1, 2, 3})):
        assert (
            set(tokens_of(codec, reveal(codec, logits, y, draws_u(1000), SamplingSettings(top_p=top_p))))
            == kept
        )


@pytest.mark.parametrize("scale", [0.0, 0.02, 4.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.9001), (1500, 1.0), (1500, 0.6003), (NUM_CANDIDATES[0], 0.5001), (7, 0.51)]
)
def test_truncation_of_large_vocabularies_equals_the_sorted_definition(
    scale: float, top_k: int, top_p: float
) -> None:
    vocab_size = 3000
    codec = SubtokenCodec(vocab_size, 1)
    generator = torch.Generator().manual_seed(8)
    logits = scale * torch.randn(vocab_size, generator=generator)
    law = token_law(codec, logits.tolist(), (codec.mask_index,), SamplingSettings(top_k=top_k, top_p=top_p))
    edges = torch.tensor(law, dtype=torch.float64).cumsum(0)
    u = draws_u(500)
    u = u[(u[:, None] - edges).abs().amin(-1) > 1e-6]
    assert len(u) > 50
    y = torch.full((len(u), 1), codec.mask_index)
    settings = SamplingSettings(top_k=top_k, top_p=top_p)
    drawn = tokens_of(codec, reveal(codec, logits.expand(len(u), -1), y, u, settings))
    expected = torch.searchsorted(edges, u, right=True).tolist()
    # Which token crosses p may turn on the last bit of a sum; nothing else may.
    assert sum(a != b for a, b in zip(drawn, expected, strict=True)) <= len(u) // 50


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    codec = SubtokenCodec(30, 2)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 30, generator=generator)
    y = torch.full((5, 2), codec.mask_index)
    y[1, 0] = 2
    good = reveal(codec, logits, y, draws_u(5))
    logits[1, 3] = bad  # also where the token is excluded by a visible digit
    logits[3, 7] = bad
    revealed = reveal(codec, logits, y, draws_u(5))
    assert revealed.finite.tolist() == [True, False, True, False, True]
    assert torch.equal(revealed.y[[0, 2, 4]], good.y[[0, 2, 4]])
    assert torch.equal(revealed.y[[1, 3]], y[[1, 3]])


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_row_without_a_possible_token_fails(settings: SamplingSettings) -> None:
    codec = SubtokenCodec(30, 2)
    logits = torch.zeros(2, 30)
    logits[0] = -torch.inf
    y = torch.tensor([[6, 6], [5, 6]])
    logits[1, codec.digits[:, 0] == 5] = -torch.inf
    revealed = reveal(codec, logits, y, draws_u(2), settings)
    assert revealed.finite.tolist() == [False, False]
    assert torch.equal(revealed.y, y)


def test_extreme_temperatures_stay_finite() -> None:
    codec = SubtokenCodec(30, 2)
    logits = 1e4 * torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    y = torch.full((50, 2), codec.mask_index)
    cold = reveal(codec, logits, y, draws_u(50), SamplingSettings(temperature=1e-30))
    greedy = reveal(codec, logits, y, draws_u(50), SamplingSettings(temperature=0.0))
    assert bool(cold.finite.all())
    assert torch.equal(cold.y, greedy.y)
    assert codec.decode(greedy.y).tolist() == logits.argmax(-1).tolist()
    assert bool(reveal(codec, logits, y, draws_u(50), SamplingSettings(temperature=100.0)).finite.all())


@pytest.mark.parametrize("truncation", [{}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}])
def test_greedy_tells_nearly_equal_logits_apart_and_takes_the_lowest_id_of_equals(
    truncation: dict[str, Any],
) -> None:
    codec = SubtokenCodec(3, 1)
    logits = torch.tensor([[0.0, -2e-8, 1e-8], [-1e-9, 1e-8, 1e-8], [0.0, 0.0, 0.0], [5.0, 5.0, 1.0]])
    y = torch.full((4, 1), codec.mask_index)
    settings = SamplingSettings(temperature=0.0, **truncation)
    assert tokens_of(codec, reveal(codec, logits, y, draws_u(4), settings)) == [2, 1, 0, 0]


def test_a_row_is_bitwise_independent_of_its_neighbours() -> None:
    codec = SubtokenCodec(20011, 4)
    generator = torch.Generator().manual_seed(5)
    num_rows = 12
    logits = 3 * torch.randn(num_rows, 20011, generator=generator)
    y = codec.encode(torch.randint(0, 20011, (num_rows,), generator=generator))
    due = torch.rand(y.shape, generator=generator) < 0.6
    y[due] = codec.mask_index
    temperature = torch.tensor([1.0, 0.0, 0.7, 2.0] * 3)
    top_k = torch.tensor([0, 0, 50, 0, 2000, 0] * 2)
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.95, 0.5] * 2)
    arguments = [logits, y, due, draws_u(num_rows), temperature, top_k, top_p]

    def run(rows: list[int]) -> Tensor:
        logits, y, due, u, temperature, top_k, top_p = (part[rows] for part in arguments)
        return reveal_tokens(
            logits, y, due, codec.digits, u, temperature, top_k, top_p, mask_index=codec.mask_index
        ).y

    together = run(list(range(num_rows)))
    assert all(torch.equal(run([row])[0], together[row]) for row in range(num_rows))
    assert torch.equal(run([11, 3, 7]), together[[11, 3, 7]])


def test_inputs_are_left_alone() -> None:
    codec = SubtokenCodec(30, 2)
    logits, y = torch.zeros(2, 30), torch.full((2, 2), codec.mask_index)
    reveal(codec, logits, y, draws_u(2), SamplingSettings(temperature=0.5, top_k=3))
    assert not logits.any()
    assert bool((y == codec.mask_index).all())
