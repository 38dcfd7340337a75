"""The digits of every token in the forms that the draws read: made once for a codec, kept by the caller.

All digits of a token are packed into one integer (`kernels.packed_digits`). So carry-over (MDM-Prime, arXiv 2505.18495,
section 3.3) costs one AND and one comparison per token, whatever the permutation of the codec: token x agrees with the
visible digits of a row where

    packed[x] & care == want,     want: the visible digits packed, care: all bits of the visible digits.

For V = 50257 that is a table of 2 bytes a token if b is a power of two or S <= 4. No (S, V, b) table exists.

Shapes: R rows (one token position each), V tokens, S digits a token, b = base, K tokens of the most common digit.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.packed_digits import digit_bits, digit_shifts, pack_digits

MAX_SHORT_VOCAB_SIZE = 1024
"""Up to so many tokens whole rows are worked on with numpy, on a CPU."""

_MAX_VERDICTS = 2**22  # of partly masked tokens on tokens: 16 MB


class Candidates(NamedTuple):
    """Which tokens have digit j equal to v, for every j and v: row j b + v of both tables, in the order of the ids.

    Attributes:
        tokens: (S b, K) int64, filled up with token 0.
        packed: (S b, K) int32 or int64, their packed digits, filled up with -1, which no packed digits are.
    """

    tokens: Tensor
    packed: Tensor


class Fields(NamedTuple):
    """The same digits for numpy; only on a CPU.

    Attributes:
        table: (V, S) int64, the digits of every token.
        place_values: (S,) int64, of the number in base b + 1 that partly masked digits write, b where masked.
        verdicts: ((b + 1)^S, V) float32, for each of these numbers: 0 where a token agrees with it, else -inf.
            (0, V) if S = 1: of a token that is due nothing is visible then.
    """

    table: NDArray[Any]
    place_values: NDArray[Any]
    verdicts: NDArray[Any]


class TokenDigits:
    """Digits of every token.

    Attributes:
        table: (V, S) int64.
        mask_index: b.
        num_bits: bits of one digit.
        packed: (V,) int16, int32 or int64, see `pack_digits`. The top bit may be used: a number can be negative, and is
            to be read through `care`.
    """

    def __init__(self, digits: Tensor, mask_index: int) -> None:
        """Pack the digits; nothing is copied to the host.

        Args:
            digits: (V, S) integers in 0..b-1.
            mask_index: b.

        Raises:
            ValueError: if the digits of a token do not fit into 62 bits.
        """
        self.table = digits
        self.mask_index = mask_index
        self.num_bits = digit_bits(mask_index)
        width = self.num_bits * digits.shape[1]
        if width > 62:
            raise ValueError(f"{digits.shape[1]} digits of {self.num_bits} bits do not fit into 62 bits")
        self.packed = pack_digits(digits.long(), mask_index)

    @classmethod
    def of(cls, digits: Tensor | TokenDigits, mask_index: int) -> TokenDigits:
        """Return the digits as they are if they are packed already, else pack them.

        Raises:
            ValueError: if they were packed for another base.
        """
        if not isinstance(digits, TokenDigits):
            return cls(digits, mask_index)
        if digits.mask_index != mask_index:
            raise ValueError(f"digits were packed for mask_index {digits.mask_index}, got {mask_index}")
        return digits

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.table.shape[0]

    @property
    def num_digits(self) -> int:
        """S."""
        return self.table.shape[1]

    @cached_property
    def shifts(self) -> Tensor:
        """Lowest bit (S,) of every digit."""
        return digit_shifts(self.num_digits, self.mask_index, self.table.device)

    @cached_property
    def _digit_bits(self) -> Tensor:
        """All bits (S,) int64 of every digit."""
        return (1 << self.num_bits) - 1 << self.shifts

    @cached_property
    def fields(self) -> Fields | None:
        """What numpy draws with (`kernels.short_rows`): only of few tokens, on a CPU."""
        num_states = (self.mask_index + 1) ** self.num_digits if self.num_digits > 1 else 0
        if not self.table.is_cpu or self.vocab_size > MAX_SHORT_VOCAB_SIZE:
            return None
        if num_states * self.vocab_size > _MAX_VERDICTS:
            return None
        states = torch.cartesian_prod(*[torch.arange(self.mask_index + 1)] * self.num_digits)[:num_states]
        disagree = self.contradicted(states.view(-1, self.num_digits))
        return Fields(
            self.table.numpy(),
            (self.mask_index + 1) ** np.arange(self.num_digits)[::-1],
            torch.zeros(disagree.shape).masked_fill_(disagree, -torch.inf).numpy(),
        )

    def visible(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return what tokens must agree with: (want, care), both (R,) int64.

        Args:
            y: (R, S) integers, digits in 0..b-1, or ``mask_index`` where masked.
        """
        shown = y != self.mask_index
        want = (torch.where(shown, y, 0).long() << self.shifts).sum(-1)
        care = torch.where(shown, self._digit_bits, 0).sum(-1)
        return want, care

    def contradicted(self, y: Tensor) -> Tensor:
        """Return which tokens (R, V) bool disagree with the visible digits of y (R, S)."""
        want, care = (part[:, None].to(self.packed.dtype) for part in self.visible(y))
        return (self.packed & care).ne(want)

    @cached_property
    def candidates(self) -> Candidates | None:
        """The tokens of every digit; None where a digit would rule out too few of them to be worth a table."""
        lines = self.table + torch.arange(self.num_digits, device=self.table.device) * self.mask_index
        counts = lines.flatten().bincount(minlength=self.num_digits * self.mask_index)
        counts = counts.unflatten(0, (self.num_digits, -1))
        if 4 * int(counts.max()) > self.vocab_size:
            return None
        # Of equal digits the lowest ids come first; K slots for each digit, of which the last may stay empty.
        slot = torch.arange(int(counts.max()), device=self.table.device)
        start = counts.cumsum(-1) - counts
        index = (start[..., None] + slot).clamp(max=self.vocab_size - 1)
        tokens = self.by_digit.gather(-1, index.flatten(1)).unflatten(-1, index.shape[1:])
        filled = slot < counts[..., None]
        wide = torch.int32 if self.num_bits * self.num_digits < 32 else torch.int64
        packed = (self.table << self.shifts).sum(-1).to(wide)[tokens]
        return Candidates(
            torch.where(filled, tokens, 0).flatten(0, 1), torch.where(filled, packed, -1).flatten(0, 1)
        )

    @cached_property
    def in_order(self) -> bool:
        """Whether token x has the digits of the number x: no permutation."""
        device = self.table.device
        place_values = self.mask_index ** torch.arange(self.num_digits - 1, -1, -1, device=device)
        return bool((self.table * place_values).sum(-1).equal(torch.arange(self.vocab_size, device=device)))

    @cached_property
    def by_digit(self) -> Tensor:
        """The tokens in the order of each digit, of equal digits the lowest ids first: (S, V) int64."""
        return self.table.T.contiguous().argsort(dim=-1, stable=True)
