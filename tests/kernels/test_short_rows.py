"""Short vocabularies on a CPU: numpy's draws are those of the reference for any vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import reveal as reveal_module
from kernels import short_rows
from kernels.reveal import Revealed, reveal_tokens, reveal_tokens_
from kernels.token_digits import TokenDigits
from prime_core.codec import SubtokenCodec


class Case(NamedTuple):
    """Rows in all kinds of states, drawn in all ways."""

    codec: SubtokenCodec
    logits: Tensor
    y: Tensor
    due: Tensor
    u: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor

    def draw(self, rows: Tensor | slice = slice(None)) -> Revealed:
        logits, y, due, *settings = (part[rows] for part in self[1:])
        return reveal_tokens(logits, y, due, self.codec.digits, *settings, mask_index=self.codec.mask_index)


def case(vocab_size: int, num_digits: int, num_rows: int = 400) -> Case:
    generator = torch.Generator().manual_seed(vocab_size + num_digits)

    def choice(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        index = torch.randint(0, len(values), (num_rows,), generator=generator)
        return torch.tensor(values, dtype=dtype)[index]

    codec = SubtokenCodec(vocab_size, num_digits, torch.randperm(vocab_size, generator=generator))
    y = codec.encode(torch.randint(0, vocab_size, (num_rows,), generator=generator))
    masked = torch.rand(y.shape, generator=generator) < 0.6
    y[masked] = codec.mask_index
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.02] = -torch.inf
    logits[3, 0], logits[4, 1], logits[5] = torch.nan, torch.inf, -torch.inf
    return Case(
        codec,
        logits,
        y,
        masked & (torch.rand(y.shape, generator=generator) < 0.8),
        torch.rand(num_rows, dtype=torch.float64, generator=generator),
        choice([1.0, 1.0, 0.0, 0.7, 1e-42]),
        choice([0, 0, 3], torch.int64),
        choice([1.0, 1.0, 0.8]),
    )


@pytest.mark.parametrize(("vocab_size", "num_digits"), [(11, 2), (40, 1), (257, 2), (256, 8), (1000, 3)])
def test_they_draw_what_the_reference_of_any_vocabulary_draws(
    vocab_size: int, num_digits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = case(vocab_size, num_digits)
    assert short_rows.is_short(TokenDigits(rows.codec.digits, rows.codec.mask_index))
    short = rows.draw()
    monkeypatch.setattr(reveal_module, "is_short", lambda tokens: False)
    general = rows.draw()
    assert torch.equal(short.finite, general.finite) and torch.equal(short.changed, general.changed)
    assert 300 < int(short.finite.sum()) < 400
    # A quantile within a rounding of an edge may fall on either side: hardly one row in ten thousand.
    assert int((short.y != general.y).any(-1).sum()) <= 1


def test_a_row_is_bitwise_independent_of_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that are greedy or truncated, and of where the chunks end."""
    rows = case(257, 2)
    together = rows.draw()
    monkeypatch.setattr(short_rows, "_SCORES_AT_A_TIME", 3 * 257)
    for part in (slice(0, 1), slice(7, 12), torch.tensor([350, 20, 21]), slice(None)):
        assert torch.equal(rows.draw(part).y, together.y[part])


def test_rows_with_nothing_due_may_repeat_the_position_of_another() -> None:
    codec = SubtokenCodec(16, 2)
    state = torch.full((3, 2), codec.mask_index)
    due = torch.tensor([[True, True], [False, False], [False, False]])
    logits = torch.full((3, 16), -torch.inf)
    logits[0, 9] = 0.0  # the others could not be drawn
    revealed = reveal_tokens_(
        logits,
        state,
        torch.tensor([1, 1, 1]),
        due,
        codec.digits,
        torch.full((3,), 0.5, dtype=torch.float64),
        None,
        None,
        None,
        mask_index=codec.mask_index,
    )
    assert revealed.finite.tolist() == [True, True, True]
    assert revealed.changed.tolist() == [True, False, False]
    assert state.tolist() == [[4, 4], codec.encode(torch.tensor(9)).tolist(), [4, 4]]


def test_what_needs_many_partly_masked_states_goes_the_other_way() -> None:
    """The table has (b + 1)^S of them times V, most of which no vocabulary of few tokens needs."""
    tokens = TokenDigits(torch.arange(16)[:, None] >> torch.arange(12) & 1, 2)
    assert not short_rows.is_short(tokens)
    assert not short_rows.is_short(TokenDigits(SubtokenCodec(1000, 10).digits, 2))
    codec = SubtokenCodec(257, 4)
    fields = TokenDigits(codec.digits, codec.mask_index).fields
    assert fields is not None and fields.verdicts.shape == ((codec.base + 1) ** 4, 257)
    plain = TokenDigits(torch.arange(1000)[:, None], 1000).fields
    assert plain is not None and plain.verdicts.shape == (0, 1000)
    state = torch.tensor([codec.mask_index, 1, codec.mask_index, 0])
    agree = (codec.digits[:, 1] == 1) & (codec.digits[:, 3] == 0)
    assert torch.equal(torch.from_numpy(fields.verdicts[state.numpy() @ fields.place_values] == 0), agree)


def test_the_extreme_uniform_numbers_draw_tokens_with_mass() -> None:
    codec = SubtokenCodec(9, 1)
    logits = torch.full((2, 9), -torch.inf)
    logits[:, [3, 6]] = torch.tensor([0.0, -80.0])
    y, due = torch.full((2, 1), codec.mask_index), torch.ones(2, 1, dtype=torch.bool)
    u = torch.tensor([0.5, 2.0**53 - 1], dtype=torch.float64) * 2.0**-53
    revealed = reveal_tokens(logits, y, due, codec.digits, u, None, None, None, mask_index=codec.mask_index)
    assert codec.decode(revealed.y).tolist()[0] == 3
    assert codec.decode(revealed.y).tolist()[1] in (3, 6)
