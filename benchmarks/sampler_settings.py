"""What `prime-bench sampler` is told: one workload, or a TOML file with many."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from benchmarks.command_line import UsageError, explain
from benchmarks.contenders import DTypeName, SamplerName
from benchmarks.settings import MemorySettings
from benchmarks.workloads import MODELS, VOCAB_SIZES, ModelName, Workload
from prime_core.codec import SubtokenCodec
from prime_core.config import DiTConfig

_MODEL_NAMES = ", ".join(get_args(ModelName))
# What a workload of a file may set; lists are swept.
WORKLOAD_FIELDS = (
    "model", "vocab_size", "target_length", "length", "batch_size", "steps", "dtype", "repeats", "dense_steps",
)  # fmt: skip


class SamplerSettings(MemorySettings):
    """A comparison."""

    against: Literal["dense_published"] = Field(description="baseline: dense_published")
    model: ModelName = Field(default="small", description=f"network: {_MODEL_NAMES}")
    vocab_size: int = Field(
        default=0, ge=0, le=2**20, description="tokens V; 0: 50257 for text, 256 for images"
    )
    target_length: int = Field(default=4, ge=1, le=24, description="digits a token S")
    length: int = Field(
        default=0, ge=0, le=2**20, description="tokens a row L; 0: 128 for text, the whole picture for images"
    )
    batch_size: int = Field(default=4, ge=1, le=1024, description="rows B")
    steps: int = Field(default=32, ge=1, le=65536, description="steps of the grid N")
    dtype: Literal["float32", "bfloat16", "both"] = Field(
        default="both", description="weights: float32, bfloat16 or both"
    )
    repeats: int = Field(default=3, ge=1, le=100, description="timed runs of each sampler, interleaved")
    dense_steps: int = Field(
        default=0,
        ge=0,
        le=65536,
        description="steps of the dense sampler to time; the run's time is extrapolated from them and labelled so. "
        "0: the whole run",
    )
    cuda_graphs: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="run this project's sampler a second time with at most so many CUDA graphs, on a GPU; 0: do not",
    )
    workloads: Path | None = Field(
        default=None,
        description="TOML file with a list [[workloads]] of "
        + ", ".join(WORKLOAD_FIELDS)
        + "; a list of values "
        "is swept",
    )

    @model_validator(mode="after")
    def _check_codec(self) -> Self:
        codec = SubtokenCodec(self.vocab_size_or_default, self.target_length)  # says what is wrong
        network = MODELS[self.model]
        if self.length_or_default > network.length:
            raise ValueError(f"length must be at most the network's {network.length}, got {self.length}")
        if isinstance(network, DiTConfig):
            if network.hidden_size % self.target_length:
                raise ValueError(
                    f"target_length must divide the network's width {network.hidden_size}, got {self.target_length}"
                )
            return self
        if self.length_or_default != network.length:
            raise ValueError(f"length of this network's pictures is {network.length}, got {self.length}")
        if codec.base**codec.target_length != codec.vocab_size:
            raise ValueError(
                "target_length of images must make every code a pixel value: 1, 2, 4 or 8 for 256"
            )
        _ = self.workload.config  # the width must hold all digits of a pixel
        return self

    @property
    def vocab_size_or_default(self) -> int:
        """Tokens V."""
        return self.vocab_size or VOCAB_SIZES[MODELS[self.model].kind]

    @property
    def length_or_default(self) -> int:
        """Tokens a row L."""
        network = MODELS[self.model]
        return self.length or (128 if isinstance(network, DiTConfig) else network.length)

    @property
    def dtypes(self) -> tuple[DTypeName, ...]:
        """The precisions to run, the published one of a CPU first."""
        return ("float32", "bfloat16") if self.dtype == "both" else (self.dtype,)

    @property
    def samplers(self) -> tuple[SamplerName, ...]:
        """What is compared."""
        graphs: tuple[SamplerName, ...] = ("planned_graphs",) if self.cuda_graphs else ()
        return ("planned", *graphs, "dense_published")

    @property
    def workload(self) -> Workload:
        """What all samplers do."""
        return Workload(
            self.model,
            self.vocab_size_or_default,
            self.target_length,
            self.length_or_default,
            self.batch_size,
            self.steps,
            self.seed,
        )


def read_workloads(settings: SamplerSettings, path: Path) -> list[SamplerSettings]:
    """Return the settings of every workload of a file, lists of values swept.

    Args:
        settings: what the file does not say.
        path: the file.

    Raises:
        UsageError: if the file cannot be read, or a workload is not valid; the message names it.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--workloads: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--workloads: {path} is not TOML: {error}") from None
    entries = content.pop("workloads", [])
    if content or not isinstance(entries, list) or not entries:
        raise UsageError(f"--workloads: {path} must hold a list [[workloads]] and nothing else")
    found: list[SamplerSettings] = []
    for number, entry in enumerate(entries, 1):
        if unknown := sorted(set(entry) - set(WORKLOAD_FIELDS)):
            raise UsageError(
                f"--workloads: {unknown[0]} of workload {number} is unknown: {', '.join(WORKLOAD_FIELDS)}"
            )
        found += [_one(settings, single, number) for single in _sweep(entry)]
    return found


def _sweep(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every combination of the values of an entry; what is no list has one value."""
    values = [value if isinstance(value, list) else [value] for value in entry.values()]
    return [dict(zip(entry, chosen, strict=True)) for chosen in itertools.product(*values)]


def _one(settings: SamplerSettings, entry: dict[str, Any], number: int) -> SamplerSettings:
    try:
        return SamplerSettings(**settings.model_dump(exclude={"workloads"}) | entry)
    except ValidationError as error:
        reasons = "; ".join(explain(item["loc"], item["msg"]) for item in error.errors())
        raise UsageError(f"--workloads: workload {number}: {reasons}") from None
