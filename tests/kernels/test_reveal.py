"""Drawing tokens: the law of one row, tails, truncation, failures, independence of neighbours."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.noise import Purpose, uniform
from kernels.reveal import Revealed, reveal_tokens, reveal_tokens_
from kernels.token_digits import TokenDigits
from kernels.truncate import NUM_CANDIDATES
from prime_core.codec import SubtokenCodec
from prime_core.exact.tokens import token_law
from prime_core.sampling.settings import SamplingSettings
from tests.chi_square import p_value

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: tuple[Backend, ...] = ("reference", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every implementation; on a CPU Triton's interpreter, which takes a good part of a second for a few rows."""
    if request.param == "triton":
        pytest.importorskip("triton")
    chosen: Backend = request.param
    return chosen


def is_slow(backend: Backend) -> bool:
    return backend == "triton" and DEVICE == "cpu"


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
    backend: Backend = "reference",
) -> Revealed:
    """All rows with the same settings; everything masked is due unless given. The result is on the CPU."""
    settings = SamplingSettings() if settings is None else settings
    ones = torch.ones(len(y), device=DEVICE)
    revealed = reveal_tokens(
        logits.to(DEVICE),
        y.to(DEVICE),
        (y == codec.mask_index if due is None else due).to(DEVICE),
        codec.digits.to(DEVICE),
        u.to(DEVICE),
        ones * settings.temperature_at(1.0),
        None if settings.top_k == 0 else torch.full((len(y),), settings.top_k, device=DEVICE),
        None if settings.top_p == 1 else ones * settings.top_p,
        mask_index=codec.mask_index,
        backend=backend,
    )
    return Revealed(*(part.cpu() for part in revealed))


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


def test_only_due_digits_are_written_and_they_share_one_draw(backend: Backend) -> None:
    num_rows = 6 if is_slow(backend) else 200
    codec = SubtokenCodec(1000, 3)
    logits = torch.randn(num_rows, 1000, generator=torch.Generator().manual_seed(0))
    y = torch.full((num_rows, 3), codec.mask_index)
    due = torch.tensor([True, False, True]).expand(num_rows, -1)
    part, whole = (
        reveal(codec, logits, y, draws_u(num_rows), due=d, backend=backend).y
        for d in (due, torch.ones_like(due))
    )
    assert torch.equal(part[:, [0, 2]], whole[:, [0, 2]])
    assert bool((part[:, 1] == codec.mask_index).all())


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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float, backend: Backend) -> None:
    codec = SubtokenCodec(30, 2)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 30, generator=generator)
    y = torch.full((5, 2), codec.mask_index)
    y[1, 0] = 2
    good = reveal(codec, logits, y, draws_u(5), backend=backend)
    logits[1, 3] = bad  # also where the token is excluded by a visible digit
    logits[3, 7] = bad
    revealed = reveal(codec, logits, y, draws_u(5), backend=backend)
    assert revealed.finite.tolist() == revealed.changed.tolist() == [True, False, True, False, True]
    assert torch.equal(revealed.y[[0, 2, 4]], good.y[[0, 2, 4]])
    assert torch.equal(revealed.y[[1, 3]], y[[1, 3]])


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_row_without_a_possible_token_fails(settings: SamplingSettings, backend: Backend) -> None:
    codec = SubtokenCodec(30, 2)
    logits = torch.zeros(2, 30)
    logits[0] = -torch.inf
    y = torch.tensor([[6, 6], [5, 6]])
    logits[1, codec.digits[:, 0] == 5] = -torch.inf
    revealed = reveal(codec, logits, y, draws_u(2), settings, backend=backend)
    assert revealed.finite.tolist() == revealed.changed.tolist() == [False, False]
    assert torch.equal(revealed.y, y)


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


def test_inputs_are_left_alone(backend: Backend) -> None:
    codec = SubtokenCodec(30, 2)
    logits, y = torch.zeros(2, 30), torch.full((2, 2), codec.mask_index)
    reveal(codec, logits, y, draws_u(2), SamplingSettings(temperature=0.5, top_k=3), backend=backend)
    assert not logits.any()
    assert bool((y == codec.mask_index).all())


def mixed_rows(codec: SubtokenCodec, num_rows: int, seed: int = 5) -> dict[str, Tensor]:
    """Arguments of rows with all kinds of settings, some with nothing due."""
    generator = torch.Generator().manual_seed(seed)
    y = codec.encode(torch.randint(0, codec.vocab_size, (num_rows,), generator=generator))
    due = torch.rand(y.shape, generator=generator) < 0.5
    due[0] = False
    y[due] = codec.mask_index
    return {
        "logits": 2 * torch.randn(num_rows, codec.vocab_size, generator=generator),
        "y": y,
        "due": due,
        "u": draws_u(num_rows),
        "temperature": torch.tensor([1.0, 0.0, 0.7, 2.0]).repeat(num_rows)[:num_rows],
        "top_k": torch.tensor([0, 7, 0, 50, 0]).repeat(num_rows)[:num_rows],
        "top_p": torch.tensor([1.0, 1.0, 0.9, 0.5, 1.0]).repeat(num_rows)[:num_rows],
    }


def run(
    codec: SubtokenCodec,
    rows: dict[str, Tensor],
    backend: Backend,
    digits: Tensor | TokenDigits | None = None,
) -> Revealed:
    digits = codec.digits.to(DEVICE) if digits is None else digits
    on_device = {name: part.to(DEVICE) for name, part in rows.items()}
    revealed = reveal_tokens(**on_device, digits=digits, mask_index=codec.mask_index, backend=backend)
    return Revealed(*(part.cpu() for part in revealed))


@pytest.mark.parametrize(
    ("vocab_size", "target_length", "num_rows"), [(600, 3, 10), (257, 8, 5), (16, 4, 5), (4999, 2, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_draws_what_the_reference_draws(
    vocab_size: int, target_length: int, num_rows: int, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    permutation = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))
    codec = SubtokenCodec(vocab_size, target_length, permutation)
    rows = mixed_rows(codec, num_rows)
    if dtype != torch.float32 and vocab_size != 600:
        rows = {name: part[:3] for name, part in rows.items()}
    padded = torch.zeros(2 * len(rows["y"]), vocab_size + 3, dtype=dtype)
    padded[::2, :-3] = rows["logits"].to(dtype)
    rows["logits"] = padded[::2, :-3]  # neither rows nor memory are contiguous
    rows["y"] = rows["y"].T.contiguous().T
    expected, drawn = (run(codec, rows, backend) for backend in BACKENDS)
    assert all(torch.equal(a, b) for a, b in zip(expected, drawn, strict=True))
    assert torch.equal(expected.changed, rows["due"].any(-1))
    rounded = run(codec, rows | {"logits": rows["logits"].float()}, "reference")
    assert torch.equal(rounded.y, expected.y)


def test_the_kernel_ranks_long_rows_by_several_chunks() -> None:
    pytest.importorskip("triton")
    codec = SubtokenCodec(3000, 1)
    rows = {name: part[1:4] for name, part in mixed_rows(codec, 4).items()}
    rows["y"], rows["due"] = torch.full((3, 1), codec.mask_index), torch.ones(3, 1, dtype=torch.bool)
    rows["logits"] = rows["logits"].round()  # many equals
    rows["temperature"] = torch.ones(3)
    rows["top_k"], rows["top_p"] = torch.tensor([1700, 0, 300]), torch.tensor([1.0, 0.6003, 0.9])
    expected, drawn = (run(codec, rows, backend) for backend in BACKENDS)
    assert torch.equal(expected.y, drawn.y)


def test_a_row_of_the_kernel_is_independent_of_its_neighbours() -> None:
    pytest.importorskip("triton")
    codec = SubtokenCodec(4999, 3)
    rows = mixed_rows(codec, 5)
    together = run(codec, rows, "triton")
    for row in (1, 3):
        alone = run(codec, {name: part[row : row + 1] for name, part in rows.items()}, "triton")
        assert torch.equal(alone.y[0], together.y[row])


@pytest.mark.parametrize("narrow", [torch.int64, torch.int16])
def test_digits_are_written_straight_into_a_state(backend: Backend, narrow: torch.dtype) -> None:
    codec = SubtokenCodec(60, 3)
    rows = mixed_rows(codec, 5)
    expected = run(codec, rows, "reference")
    positions = torch.tensor([3, 8, 0, 3, 5])  # nothing is due in row 0, so it may repeat a position
    state = torch.full((9, 3), 2, dtype=narrow, device=DEVICE)
    state[positions[1:].to(DEVICE)] = rows["y"][1:].to(DEVICE, narrow)
    before = state.cpu()
    on_device = {name: part.to(DEVICE) for name, part in rows.items() if name != "y"}
    revealed = reveal_tokens_(
        state=state,
        positions=positions.to(DEVICE),
        digits=TokenDigits(codec.digits.to(DEVICE), codec.mask_index),
        **on_device,
        mask_index=codec.mask_index,
        backend=backend,
    )
    assert revealed.y is state
    assert state.dtype == narrow
    assert torch.equal(revealed.finite.cpu(), expected.finite)
    assert torch.equal(revealed.changed.cpu(), rows["due"].any(-1))
    before[positions[1:]] = expected.y[1:].to(narrow)
    assert torch.equal(state.cpu(), before)


def test_a_row_with_nothing_due_changes_nothing_and_does_not_fail(backend: Backend) -> None:
    codec = SubtokenCodec(60, 3)
    rows = mixed_rows(codec, 2)
    rows["logits"][0] = math.nan
    revealed = run(codec, rows, backend)
    assert revealed.finite.tolist() == [True, True]
    assert revealed.changed.tolist() == [False, True]


def test_no_rows_are_no_error(backend: Backend) -> None:
    codec = SubtokenCodec(60, 3)
    revealed = run(codec, {name: part[:0] for name, part in mixed_rows(codec, 2).items()}, backend)
    assert [part.shape for part in revealed] == [(0, 3), (0,), (0,)]


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


def test_a_kernel_outside_the_interpreter_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    codec = SubtokenCodec(60, 3)
    cpu = mixed_rows(codec, 2)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        reveal_tokens(**cpu, digits=codec.digits, mask_index=codec.mask_index, backend="triton")


def test_which_implementation_runs_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = pytest.importorskip("kernels.triton_ops.reveal")
    codec, calls = SubtokenCodec(60, 3), []
    real = launched.launch_reveal
    monkeypatch.setattr(launched, "launch_reveal", lambda *args: calls.append(1) or real(*args))
    for backend, number in (("reference", 0), ("triton", 1), ("auto", 2 if DEVICE == "cuda" else 1)):
        run(codec, mixed_rows(codec, 1), backend)  # type: ignore[arg-type]
        assert len(calls) == number


def test_digits_packed_for_another_base_are_refused() -> None:
    codec = SubtokenCodec(60, 3)
    with pytest.raises(ValueError, match="packed for mask_index 5, got 4"):
        run(codec, mixed_rows(codec, 1), "reference", TokenDigits(codec.digits, 5))
