"""Drawing digits alone: the marginal laws, their tails, independence, failures, neighbours."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.marginal import reveal_digits, reveal_digits_
from kernels.noise import Purpose, uniform
from kernels.reveal import Revealed, reveal_tokens
from kernels.token_digits import TokenDigits
from prime_core.codec import SubtokenCodec
from prime_core.exact.tokens import digit_laws, independent
from prime_core.sampling.settings import SamplingSettings
from tests.chi_square import p_value
from tests.kernels.drawing import BACKENDS, DEVICE, is_slow
from tests.kernels.drawing import reveal as reveal_by

SETTINGS = [
    SamplingSettings(),
    SamplingSettings(temperature=0.6),
    SamplingSettings(temperature=0.0),
    SamplingSettings(top_k=3),
    SamplingSettings(top_p=0.7),
    SamplingSettings(temperature=1.7, top_k=5, top_p=0.8),
]


reveal = partial(reveal_by, draw=reveal_digits)


def draws_u(num_draws: int, num_digits: int) -> Tensor:
    index = torch.arange(num_draws)[:, None].expand(-1, num_digits)
    return uniform(3, index, torch.arange(num_digits).expand_as(index), Purpose.DRAW)


def permuted_codec(vocab_size: int, target_length: int) -> SubtokenCodec:
    permutation = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))
    return SubtokenCodec(vocab_size, target_length, permutation)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("vocab_size", "target_length", "permuted"),
    [
        (16, 1, True),
        (16, 2, True),
        (16, 4, True),
        (16, 1, False),
        (16, 2, False),
        (16, 4, False),
        (27, 3, False),
    ],
)
def test_quantiles_follow_the_exact_marginals(
    settings: SamplingSettings, vocab_size: int, target_length: int, permuted: bool, backend: Backend
) -> None:
    codec = (permuted_codec if permuted else SubtokenCodec)(vocab_size, target_length)
    logits = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(2))
    laws = digit_laws(codec, logits.tolist(), settings)
    u = (torch.arange(97) + 0.5).double() / 97
    for digit, law in enumerate(laws):
        edges = torch.tensor([law.get(value, 0.0) for value in range(codec.base)]).double().cumsum(0)
        quantiles = u[(u[:, None] - edges).abs().amin(-1) > 1e-5]
        if is_slow(backend):
            if digit not in (0, target_length - 1):
                continue
            inner = edges[(edges > 1e-4) & (edges < 1 - 1e-4)]
            quantiles = inner[-1:] + 1e-5 * (1 - 2 * (digit % 2)) if len(inner) else quantiles[:1]
        y = torch.full((len(quantiles), target_length), codec.mask_index)
        each = torch.full((len(quantiles), target_length), 0.5).double()
        each[:, digit] = quantiles
        drawn = reveal(codec, logits.expand(len(quantiles), -1), y, each, settings, backend=backend)
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


@pytest.mark.parametrize("permuted", [False, True])
def test_a_rare_digit_has_its_share_of_the_uniforms(backend: Backend, permuted: bool) -> None:
    codec = permuted_codec(256, 2) if permuted else SubtokenCodec(256, 2)
    logits = torch.zeros(256)
    logits[codec.digits[:, 1] == 7] = math.log(1e-6)
    u = torch.full((4, 2), 0.5).double()
    start, share = 7 / (15 + 1e-6), 1e-6 / (15 + 1e-6)
    u[:, 1] = torch.tensor([start - share, start + 0.25 * share, start + 0.75 * share, start + 2 * share])
    drawn = reveal(codec, logits.expand(4, -1), torch.full((4, 2), 16), u, backend=backend).y
    assert drawn[:, 1].tolist() == [6, 7, 7, 8]


def test_only_due_digits_are_written(backend: Backend) -> None:
    num_rows = 5 if is_slow(backend) else 50
    codec = SubtokenCodec(64, 3)
    logits = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(0))
    y = torch.full((num_rows, 3), codec.mask_index)
    due = torch.tensor([True, False, True]).expand(num_rows, -1)
    part, whole = (
        reveal(codec, logits, y, draws_u(num_rows, 3), due=d, backend=backend).y
        for d in (due, torch.ones_like(due))
    )
    assert torch.equal(part[:, [0, 2]], whole[:, [0, 2]])
    assert bool((part[:, 1] == codec.mask_index).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
@pytest.mark.parametrize(
    ("backend", "settings"),
    [("reference", settings) for settings in SETTINGS] + [("triton", SETTINGS[0]), ("triton", SETTINGS[2])],
)
def test_a_row_without_finite_logits_fails_alone(
    bad: float | None, settings: SamplingSettings, backend: Backend
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    codec = SubtokenCodec(16, 2)
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    y = torch.full((5, 2), codec.mask_index)
    good = reveal(codec, logits, y, draws_u(5, 2), settings, backend=backend)
    for row in (1, 3):
        logits[row, slice(None) if bad is None else slice(7, 8)] = -math.inf if bad is None else bad
    revealed = reveal(codec, logits, y, draws_u(5, 2), settings, backend=backend)
    assert revealed.finite.tolist() == revealed.changed.tolist() == [True, False, True, False, True]
    assert torch.equal(revealed.y[[0, 2, 4]], good.y[[0, 2, 4]])
    assert torch.equal(revealed.y[[1, 3]], y[[1, 3]])


def test_a_row_is_bitwise_independent_of_its_neighbours_and_inputs_are_left_alone(backend: Backend) -> None:
    codec = SubtokenCodec(256, 2)
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(6, 256, generator=generator)
    y = torch.full((6, 2), 16)
    due = torch.tensor([[True, True], [True, False], [False, True]] * 2)
    temperature, top_k = torch.tensor([1.0, 0.0, 0.7] * 2), torch.tensor([0, 9, 0, 40, 0, 0])
    arguments = [logits, y, due, draws_u(6, 2), temperature, top_k, torch.tensor([1.0, 0.9, 0.5] * 2)]
    before = [part.clone() for part in arguments]

    def run(rows: list[int]) -> Tensor:
        logits, y, due, *rest = (part[rows].to(DEVICE) for part in arguments)
        digits = codec.digits.to(DEVICE)
        return reveal_digits(logits, y, due, digits, *rest, mask_index=16, backend=backend).y.cpu()

    together = run(list(range(6)))
    assert all(
        torch.equal(run([row])[0], together[row]) for row in ((1, 2) if is_slow(backend) else range(6))
    )
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_codes_without_a_token_are_refused() -> None:
    codec = SubtokenCodec(50, 2)  # 8**2 = 64 codes
    with pytest.raises(ValueError, match=r"8\*\*2 codes, but 50 tokens"):
        reveal(codec, torch.zeros(1, 50), torch.full((1, 2), 8), draws_u(1, 2))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("vocab_size", "target_length"), [(256, 2), (256, 8), (81, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_draws_what_the_reference_draws_straight_into_a_state(
    vocab_size: int, target_length: int, permuted: bool, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    codec = (permuted_codec if permuted else SubtokenCodec)(vocab_size, target_length)
    generator = torch.Generator().manual_seed(3)
    state = torch.full((7, target_length), codec.mask_index, dtype=torch.int16)
    positions = torch.tensor([4, 6, 1, 4])
    due = torch.rand(4, target_length, generator=generator) < 0.7
    due[3] = False  # so it may repeat a position
    settings = (
        torch.tensor([1.0, 0.0, 0.7, 1.0]),
        torch.tensor([0, 0, 40, 0]),
        torch.tensor([1.0, 1.0, 0.9, 1.0]),
    )
    logits = torch.randn(vocab_size + 1, 4, generator=generator).to(dtype).T[:, :-1]  # not contiguous
    results = []
    for backend in BACKENDS:
        arguments = [
            part.clone().to(DEVICE) if part is state else part.to(DEVICE)
            for part in (logits, state, positions, due, codec.digits, draws_u(4, target_length), *settings)
        ]
        arguments[4] = TokenDigits(arguments[4], codec.mask_index)  # type: ignore[call-overload]
        revealed = reveal_digits_(*arguments, mask_index=codec.mask_index, backend=backend)
        assert revealed.y is arguments[1]
        results.append(Revealed(*(part.cpu() for part in revealed)))
    expected, drawn = results
    assert all(torch.equal(a, b) for a, b in zip(expected, drawn, strict=True))
    assert torch.equal(drawn.changed, due.any(-1))
    written = torch.zeros_like(state, dtype=torch.bool)
    written[positions[:3]] = due[:3]
    assert torch.equal(drawn.y != codec.mask_index, written)


def test_kernels_have_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    codec = SubtokenCodec(8192, 1)
    with pytest.raises(ValueError, match="at most 4096 tokens, got 8192"):
        reveal(codec, torch.zeros(1, 8192), torch.full((1, 1), 8192), draws_u(1, 1), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    small, y = SubtokenCodec(16, 2), torch.full((1, 2), 4)
    ones = torch.ones(1)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        reveal_digits(
            torch.zeros(1, 16), y, y == 4, small.digits, draws_u(1, 2), ones, None, None, mask_index=4,
            backend="triton",
        )  # fmt: skip
