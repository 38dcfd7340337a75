"""Settings that several commands share: which checkpoint, where it runs, and the steps of a sampling grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings

from prime_core.device import DEVICE_PATTERN
from prime_core.integers import is_integer


class CheckpointSettings(BaseSettings):
    """A checkpoint and where it runs; the base of configurations, not one itself."""

    checkpoint: Path = Field(description="checkpoint: a folder or one .safetensors file")
    device: str = Field(default="auto", pattern=DEVICE_PATTERN, description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the weights; auto keeps what is stored"
    )
    num_threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 keeps torch's choice")


def parse_steps(value: Any) -> Any:
    """Return the steps of a sampling grid as an integer or "exact", whichever way they were written.

    Raises:
        ValueError: they are neither.
    """
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if value != "exact" and not (is_integer(value) and value >= 1):
        raise ValueError("must be an integer of at least 1, or exact")
    return value


GridSteps = Annotated[int | Literal["exact"], BeforeValidator(parse_steps)]
