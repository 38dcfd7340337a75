"""Rows of one call that draws tokens: each is drawn, fails or rests by itself, and only what is due is written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.reveal import reveal_tokens, reveal_tokens_
from kernels.token_digits import TokenDigits
from prime_core.codec import SubtokenCodec
from prime_core.sampling.settings import SamplingSettings
from tests.kernels.drawing import DEVICE, SETTINGS, draws_u, is_slow, mixed_rows, reveal, run


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


def test_digits_packed_for_another_base_are_refused() -> None:
    codec = SubtokenCodec(60, 3)
    with pytest.raises(ValueError, match="packed for mask_index 5, got 4"):
        run(codec, mixed_rows(codec, 1), "reference", TokenDigits(codec.digits, 5))
