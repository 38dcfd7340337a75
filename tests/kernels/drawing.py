"""Calls of `reveal_tokens` where the tests run: rows of one setting, and rows of all kinds of settings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.noise import Purpose, uniform
from kernels.reveal import Revealed, reveal_tokens
from kernels.token_digits import TokenDigits
from prime_core.codec import SubtokenCodec
from prime_core.sampling.settings import SamplingSettings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: tuple[Backend, ...] = ("reference", "triton")


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
    draw: Callable[..., Revealed] = reveal_tokens,
) -> Revealed:
    """All rows with the same settings; everything masked is due unless given. The result is on the CPU."""
    settings = SamplingSettings() if settings is None else settings
    ones = torch.ones(len(y), device=DEVICE)
    revealed = draw(
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
