"""What the settings of every benchmark have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from prime_core.device import DEVICE_PATTERN, choose_device

ENV_PREFIX = "PRIME_BENCH_"

Log = Callable[[str], None]
"""Takes progress lines."""


class BenchSettings(BaseSettings):
    """A benchmark. Every field is a flag, a variable PRIME_BENCH_<FIELD> and a TOML key."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", allow_inf_nan=False
    )

    device: str = Field(default="auto", pattern=DEVICE_PATTERN, description="auto, cpu, cuda or cuda:N")
    num_threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads; default: torch's choice"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of weights, inputs and noise")
    commit: str | None = Field(
        default=None,
        pattern=r"^[0-9A-Za-z._+-]{1,80}$",
        description="commit of this source tree to record; default: what git says",
    )

    @property
    def torch_device(self) -> torch.device:
        """The device to compute on.

        Raises:
            ValueError: if torch does not see it.
        """
        device = choose_device(self.device)
        return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


class MemorySettings(BenchSettings):
    """A benchmark that also measures memory; on a CPU that takes a process for each figure."""

    peak_memory: Literal["measure", "skip"] = Field(
        default="measure",
        description="measure, or skip (on a CPU it takes a process of its own for each figure)",
    )


@contextmanager
def computing_threads(num_threads: int | None) -> Iterator[None]:
    """Compute with so many CPU threads, None for as many as now."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if num_threads is None else num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
