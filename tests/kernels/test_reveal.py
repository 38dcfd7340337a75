"""Drawing tokens: the law of one row, its tails, and its truncation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kernels.backend import Backend
from kernels.token_digits import TokenDigits
from kernels.truncate import NUM_CANDIDATES
from prime_core.codec import SubtokenCodec
from prime_core.exact.tokens import token_law
from prime_core.sampling.settings import SamplingSettings
from tests.chi_square import p_value
from tests.kernels.drawing import DEVICE, SETTINGS, draws_u, is_slow, reveal, tokens_of


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("visible", [(None, None), (1, None), (None, 2)])
def test_quantiles_follow_the_exact_law(
    settings: SamplingSettings, visible: tuple[int | None, ...], backend: Backend
) -> None:
    codec = SubtokenCodec(11, 2, torch.randperm(11, generator=torch.Generator().manual_seed(1)))
    y_row = torch.tensor([codec.mask_index if digit is None else digit for digit in visible])
    logits = 2 * torch.randn(11, generator=torch.Generator().manual_seed(2))
    law = token_law(codec, logits.tolist(), tuple(y_row.tolist()), settings)
    # Tokens come in the order of their ids, so the token at quantile u is known but at the edges.
    edges = torch.tensor(law, dtype=torch.float64).cumsum(0)
    u = (torch.arange(997) + 0.5).double() / 997
    u = u[(u[:, None] - edges).abs().amin(-1) > 1e-5]
    if is_slow(backend):
        inner = edges[(edges > 1e-4) & (edges < 1 - 1e-4)]
        u = torch.stack([inner[0] - 1e-5, inner[-1] + 1e-5]) if len(inner) else u[[0, -1]]
    revealed = reveal(
        codec, logits.expand(len(u), -1), y_row.expand(len(u), -1), u, settings, backend=backend
    )
    drawn = tokens_of(codec, revealed)
    assert drawn == [int(torch.searchsorted(edges, value, right=True)) for value in u]


def test_tails_of_one_in_a_million_by_chi_square() -> None:
    """A thousand tokens of probability 1e-6 around two common ones; draws of the rare ones are counted in tens."""
    backend: Backend = "triton" if DEVICE == "cuda" else "reference"
    vocab_size, num_draws, chunk = 1002, 100_000, 4_000
    codec = SubtokenCodec(vocab_size, 1)
    probabilities = torch.full((vocab_size,), 1e-6)
    probabilities[[300, 700]] = torch.tensor([0.6, 0.399])
    cell = torch.arange(vocab_size) // 100
    cell[[300, 700]] = torch.tensor([100, 200])
    y = torch.full((chunk, 1), codec.mask_index)
    u = draws_u(num_draws)
    drawn = torch.cat(
        [
            reveal(codec, probabilities.log().expand(chunk, -1), y, part, backend=backend).y[:, 0]
            for part in u.split(chunk)
        ]
    )
    law = {c: float(probabilities[cell == c].double().sum()) for c in cell.unique().tolist()}
    assert int((cell[drawn] < 100).sum()) > 60
    assert p_value(cell[drawn].tolist(), law) > 1e-4


def test_a_rare_token_has_its_exact_share_of_the_uniforms_in_a_large_vocabulary(backend: Backend) -> None:
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
    assert tokens_of(codec, reveal(codec, logits.expand(4, -1), y, u, backend=backend)) == [
        rare - 1,
        rare,
        rare,
        rare + 1,
    ]


def test_first_and_last_uniform_never_draw_an_excluded_token(backend: Backend) -> None:
    for vocab_size in (2, 255, 256, 257, 4999):
        codec = SubtokenCodec(vocab_size, 1)
        logits = torch.full((2, vocab_size), -torch.inf)
        logits[:, [vocab_size // 3, vocab_size // 2]] = 0.3
        y = torch.full((2, 1), codec.mask_index)
        u = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
        assert tokens_of(codec, reveal(codec, logits, y, u, backend=backend)) == [
            vocab_size // 3,
            vocab_size // 2,
        ]


def test_every_draw_agrees_with_the_visible_digits_and_is_a_token(backend: Backend) -> None:
    codec = SubtokenCodec(50, 3)  # 4**3 = 64 codes, 14 of them no token
    y = codec.encode(torch.arange(50)).repeat(1 if is_slow(backend) else 40, 1)
    generator = torch.Generator().manual_seed(4)
    y[torch.rand(y.shape, generator=generator) < 0.5] = codec.mask_index
    logits = torch.randn(len(y), 50, generator=generator)
    drawn = reveal(codec, logits, y, draws_u(len(y)), backend=backend)
    assert len(tokens_of(codec, drawn)) == len(y)
    assert bool((drawn.y == y)[y != codec.mask_index].all())


def test_contradicted_is_the_digit_comparison() -> None:
    codec = SubtokenCodec(50, 3)
    y = torch.tensor([[4, 4, 4], [1, 4, 4], [4, 2, 3], [3, 0, 1]])
    expected = [
        [any(a not in (4, b) for a, b in zip(row, full, strict=True)) for full in codec.digits.tolist()]
        for row in y.tolist()
    ]
    assert TokenDigits(codec.digits, 4).contradicted(y).tolist() == expected


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


def test_extreme_temperatures_stay_finite(backend: Backend) -> None:
    num_rows = 5 if is_slow(backend) else 50
    codec = SubtokenCodec(30, 2)
    logits = 1e4 * torch.randn(num_rows, 30, generator=torch.Generator().manual_seed(1))
    y = torch.full((num_rows, 2), codec.mask_index)
    u = draws_u(num_rows)
    cold, greedy, hot = (
        reveal(codec, logits, y, u, SamplingSettings(temperature=temperature), backend=backend)
        for temperature in (1e-30, 0.0, 100.0)
    )
    assert bool(cold.finite.all())
    assert torch.equal(cold.y, greedy.y)
    assert codec.decode(greedy.y).tolist() == logits.argmax(-1).tolist()
    assert bool(hot.finite.all())


@pytest.mark.parametrize("truncation", [{}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}])
def test_greedy_tells_nearly_equal_logits_apart_and_takes_the_lowest_id_of_equals(
    truncation: dict[str, Any], backend: Backend
) -> None:
    codec = SubtokenCodec(3, 1)
    logits = torch.tensor([[0.0, -2e-8, 1e-8], [-1e-9, 1e-8, 1e-8], [0.0, 0.0, 0.0], [5.0, 5.0, 1.0]])
    y = torch.full((4, 1), codec.mask_index)
    settings = SamplingSettings(temperature=0.0, **truncation)
    assert tokens_of(codec, reveal(codec, logits, y, draws_u(4), settings, backend=backend)) == [2, 1, 0, 0]


def test_a_visible_digit_of_few_tokens_is_told_from_what_fills_its_line() -> None:
    """Of 500 tokens 52 have the highest digit 7, whose bits are all set, and 64 have any other."""
    codec = SubtokenCodec(500, 3)
    assert TokenDigits(codec.digits, codec.mask_index).candidates is not None
    y = torch.full((500, 3), codec.mask_index)
    y[:, 0] = 7
    logits = torch.zeros(500, 500)
    logits[:, 0] = 50.0  # token 0 fills up
    drawn = reveal(codec, logits, y, draws_u(500))
    assert set(tokens_of(codec, drawn)) == set(range(448, 500))
