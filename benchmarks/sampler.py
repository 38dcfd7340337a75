"""`prime-bench sampler`: this project's sampler against the published one, in one run on the same weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from benchmarks.contenders import (
    DTYPES,
    MODELS,
    DTypeName,
    Outcome,
    SamplerName,
    Workload,
    build_checkpoint,
    build_sampler,
    measure_peak_memory,
)
from benchmarks.costs import Cost, dense_cost, planned_cost, reveal_probabilities, trunk_flops
from benchmarks.machine import (
    PRODUCT_SHAPE,
    copy_bandwidth,
    describe_machine,
    describe_versions,
    git_commit,
    median_seconds,
    product_rate,
)
from prime_core.checkpoint import Checkpoint
from prime_core.codec import SubtokenCodec
from prime_core.config import DiTConfig

SCHEMA_VERSION = 1
SAMPLERS: tuple[SamplerName, ...] = ("planned", "dense_published")

Log = Callable[[str], None]


class SamplerSettings(BaseSettings):
    """A comparison. Every field is a flag, a variable PRIME_BENCH_<FIELD> and a TOML key."""

    model_config = SettingsConfigDict(
        env_prefix="PRIME_BENCH_", env_ignore_empty=True, frozen=True, extra="forbid", allow_inf_nan=False
    )

    against: Literal["dense_published"] = Field(description="baseline: dense_published")
    model: Literal["small", "tiny"] = Field(default="small", description="network: small (published) or tiny")
    vocab_size: int = Field(default=50257, ge=2, le=2**20, description="tokens V")
    target_length: int = Field(default=4, ge=1, le=24, description="digits a token S")
    length: int = Field(default=128, ge=1, le=1024, description="tokens a row L")
    batch: int = Field(default=4, ge=1, le=1024, description="rows B")
    steps: int = Field(default=32, ge=1, le=65536, description="steps of the grid N")
    dtype: Literal["float32", "bfloat16", "both"] = Field(
        default="both", description="weights: float32, bfloat16 or both"
    )
    repeats: int = Field(default=3, ge=1, le=100, description="timed runs of each sampler, interleaved")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of weights and noise")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads; default: torch's choice"
    )

    @model_validator(mode="after")
    def _check_codec(self) -> Self:
        SubtokenCodec(self.vocab_size, self.target_length)  # says what is wrong
        width = MODELS[self.model].hidden_size
        if width % self.target_length:
            raise ValueError(
                f"target_length must divide the network's width {width}, got {self.target_length}"
            )
        return self

    @property
    def dtypes(self) -> tuple[DTypeName, ...]:
        """The precisions to run, the published one first."""
        return ("float32", "bfloat16") if self.dtype == "both" else (self.dtype,)

    @property
    def workload(self) -> Workload:
        """What both samplers do."""
        return Workload(
            self.model,
            self.vocab_size,
            self.target_length,
            self.length,
            self.batch,
            self.steps,
            self.seed,
        )


def run_comparison(settings: SamplerSettings, log: Log) -> dict[str, Any]:
    """Measure both samplers, alternating, and everything needed to read the figures.

    Args:
        settings: what to compare.
        log: takes progress lines.

    Returns:
        The JSON document described in benchmarks/README.md, without `command`.
    """
    with _threads(settings.threads):
        document: dict[str, Any] = {
            "benchmark": "sampler",
            "schema_version": SCHEMA_VERSION,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": git_commit(),
            "machine": describe_machine(),
            "versions": describe_versions(),
            "settings": settings.model_dump(),
        }
        rates = {name: product_rate(dtype) for name, dtype in DTYPES.items()}
        bandwidth = copy_bandwidth()
        predicted = _predict(settings.workload, rates, bandwidth)
        for name, ratio in _ratios(predicted, settings.dtypes).items():
            log(f"predicted ratio {name}: {_shown(ratio)}")
        checkpoints = {dtype: build_checkpoint(settings.workload, dtype) for dtype in settings.dtypes}
        parameters = list(checkpoints[settings.dtypes[0]].denoiser.parameters())
        runs = _measure(settings, checkpoints, log)
        trunks = [_trunk(settings, checkpoints[dtype], dtype, rates[dtype]) for dtype in settings.dtypes]
        checkpoints.clear()
        for run in runs:
            log(f"peak memory of {run['sampler']} {run['dtype']}")
            run["peak_memory_above_weights_bytes"] = measure_peak_memory(
                run["sampler"], settings.workload, run["dtype"], torch.get_num_threads()
            )
            run["predicted_s"] = predicted[run["sampler"], run["dtype"]]
        measured = {(run["sampler"], run["dtype"]): run["median_s"] for run in runs}
        ratios = _ratios(measured, settings.dtypes), _ratios(predicted, settings.dtypes)
        return document | {
            "model": settings.workload.config.model.model_dump()
            | {"num_parameters": sum(p.numel() for p in parameters)},
            "rates": {
                "product_shape": PRODUCT_SHAPE,
                "product_flops_per_s": rates,
                "copy_bytes_per_s": bandwidth,
            },
            "runs": runs,
            "ratios": {
                name: {"measured": ratios[0][name], "predicted": ratios[1][name]} for name in ratios[0]
            },
            "trunk": trunks,
        }


def _predict(
    workload: Workload, rates: dict[str, float], bandwidth: float
) -> dict[tuple[SamplerName, DTypeName], float]:
    """Predict the seconds of every sampler and precision from FLOPs and bytes."""
    config = workload.config
    reveal = reveal_probabilities(config.schedule.build(), workload.num_steps)
    shape = (workload.num_rows, workload.length)
    codec = (workload.target_length, workload.vocab_size)
    costs: dict[SamplerName, Cost] = {
        "planned": planned_cost(workload.network, *shape, reveal, *codec),
        "dense_published": dense_cost(workload.network, *shape, workload.num_steps, *codec),
    }
    dtypes: tuple[DTypeName, ...] = ("float32", "bfloat16")
    return {
        (name, dtype): cost.predicted_s(rates[dtype], bandwidth)
        for name, cost in costs.items()
        for dtype in dtypes
    }


def _measure(
    settings: SamplerSettings, checkpoints: dict[DTypeName, Checkpoint], log: Log
) -> list[dict[str, Any]]:
    """Time all samplers in turn, ``repeats`` times, so that a slow minute slows all of them."""
    workload = settings.workload
    pairs = [(sampler, dtype) for dtype in settings.dtypes for sampler in SAMPLERS]
    samplers = {pair: build_sampler(pair[0], checkpoints[pair[1]], workload) for pair in pairs}
    seconds: dict[tuple[SamplerName, DTypeName], list[float]] = {pair: [] for pair in pairs}
    outcomes: dict[tuple[SamplerName, DTypeName], Outcome] = {}
    for dtype, checkpoint in checkpoints.items():
        log(f"warming up {dtype}")
        checkpoint.denoiser(torch.zeros(settings.batch, settings.length, settings.target_length).long())
    for repeat in range(settings.repeats):
        for pair in pairs:
            started = time.perf_counter()
            outcomes[pair] = samplers[pair]()
            seconds[pair].append(time.perf_counter() - started)
            log(f"repeat {repeat + 1} of {settings.repeats}: {pair[0]} {pair[1]} {seconds[pair][-1]:.2f} s")
    return [
        {
            "sampler": pair[0],
            "dtype": pair[1],
            "seconds": seconds[pair],
            "median_s": statistics.median(seconds[pair]),
            "tokens_per_s": outcomes[pair].tokens.numel() / statistics.median(seconds[pair]),
            "denoiser_calls": outcomes[pair].num_calls,
            "row_steps": outcomes[pair].num_row_steps,
        }
        for pair in pairs
    ]


def _trunk(
    settings: SamplerSettings, checkpoint: Checkpoint, dtype: DTypeName, product_flops_per_s: float
) -> dict[str, Any]:
    """Measure the trunk alone on a full call, every position asked for, against the product rate."""
    num_tokens = settings.batch * settings.length
    y_t = torch.full((num_tokens, settings.target_length), checkpoint.codec.mask_index)
    lengths = [settings.length] * settings.batch
    with torch.inference_mode():
        seconds = median_seconds(lambda: checkpoint.denoiser.features(y_t, lengths), 5)
    network = checkpoint.config.model
    assert isinstance(network, DiTConfig), "the benchmark's networks are transformers"
    flops = trunk_flops(network, num_tokens, settings.length)
    return {
        "dtype": dtype,
        "flops": flops,
        "seconds": seconds,
        "flops_per_s": flops / seconds,
        "share_of_product_rate": flops / seconds / product_flops_per_s,
    }


def _ratios(
    seconds: dict[tuple[SamplerName, DTypeName], float], dtypes: tuple[DTypeName, ...]
) -> dict[str, float | None]:
    """Return how many times faster the planned sampler is; None where a precision was not run.

    "as_published": in its best precision against float32, the baseline's published precision on a CPU.
    """
    equal = {
        f"equal_{dtype}": seconds["dense_published", dtype] / seconds["planned", dtype] for dtype in dtypes
    }
    best = min(seconds["planned", dtype] for dtype in dtypes)
    published = seconds["dense_published", "float32"] / best if "float32" in dtypes else None
    return {"as_published": published, **equal}


def _shown(ratio: float | None) -> str:
    return "not run" if ratio is None else f"{ratio:.1f}"


@contextmanager
def _threads(num_threads: int | None) -> Iterator[None]:
    """Compute with so many threads, None for as many as now."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if num_threads is None else num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
