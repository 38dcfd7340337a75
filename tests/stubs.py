"""Tiny denoisers with known laws, and a checkpoint-like object around them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.models.denoiser import filled_size
from prime_core.schedule import LinearSchedule, Schedule
from prime_core.tokenizer import Tokenizer


class TableDenoiser:
    """Logits looked up in a table of random numbers by the whole state of the row and the position.

    States of small rows have a table entry each, so every conditional law differs from every other one.
    Counts its calls and what they held.
    """

    linear_head = None

    def __init__(
        self,
        codec: SubtokenCodec,
        seed: int = 0,
        *,
        scale: float = 1.5,
        slope: float = 0.0,
        num_states: int = 997,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = (num_states, codec.vocab_size)
        self.table = scale * torch.randn(size, generator=generator)
        self.slopes = slope * torch.randn(size, generator=generator)  # how logits change with t
        self.base = codec.base
        self.calls = 0
        self.lengths: list[list[int]] = []

    def features(
        self,
        y_t: Tensor,
        lengths: Sequence[int],
        t: Tensor | None = None,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        assert labels is None, "the table knows no labels"
        self.calls += 1
        self.lengths.append(list(lengths))
        times = torch.zeros(len(lengths)) if t is None else t
        parts, token, row = [], 0, 0
        for length, run in itertools.groupby(lengths):  # rows of one length are looked up together
            num_rows = len(list(run))
            y = y_t[token : token + num_rows * length].view(num_rows, length, -1)
            parts.append(self._rows(y, times[row : row + num_rows]).flatten(0, 1))
            token, row = token + num_rows * length, row + num_rows
        logits = torch.cat(parts)
        return logits if positions is None else logits[positions]

    def head(self, features: Tensor) -> Tensor:
        return features

    def fill(self, lengths: Sequence[int]) -> list[int]:
        longest = max(lengths)
        whole, rest = divmod(filled_size(sum(lengths)) - sum(lengths), longest)
        return [longest] * whole + [rest] * (rest > 0)

    def __call__(self, y_t: Tensor, t: Tensor | None = None) -> Tensor:
        times = torch.zeros(len(y_t)) if t is None else t
        return self._rows(y_t, times)

    def _rows(self, y: Tensor, t: Tensor) -> Tensor:
        """Logits (B, L, V) of rows y (B, L, S) at times t (B,)."""
        digits, num_states, length = y.flatten(1), len(self.table), y.shape[1]
        place_values = [pow(self.base + 1, n, num_states) for n in reversed(range(digits.shape[1]))]
        code = (digits * torch.tensor(place_values)).sum(1)
        index = (code[:, None] * length + torch.arange(length) * 7) % num_states
        return self.table[index] + t.float()[:, None, None] * self.slopes[index]


def byte_tokenizer() -> Tokenizer:
    """256 bytes and an end-of-text token."""
    return Tokenizer([bytes([value]) for value in range(256)], {"<|endoftext|>": 256})


def stub_checkpoint(
    codec: SubtokenCodec,
    denoiser: Any,
    *,
    context: int = 16,
    schedule: Schedule | None = None,
    tokenizer: Tokenizer | None = None,
) -> Any:
    """What `sample` needs of a checkpoint."""
    return SimpleNamespace(
        config=SimpleNamespace(model=SimpleNamespace(length=context)),
        codec=codec,
        schedule=LinearSchedule() if schedule is None else schedule,
        tokenizer=tokenizer,
        denoiser=denoiser,
    )
