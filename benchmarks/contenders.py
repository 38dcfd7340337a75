"""The two samplers that are compared, on the same random weights."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.dense_published import DensePublished
from benchmarks.machine import peak_memory, reset_peak_memory
from prime_core.checkpoint import Checkpoint
from prime_core.config import CodecConfig, Config, DiTConfig
from prime_core.models.dit import DiT
from prime_core.sample import sample

SamplerName = Literal["planned", "dense_published"]
DTypeName = Literal["float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

MODELS = {
    "small": DiTConfig(),
    "tiny": DiTConfig(hidden_size=192, num_blocks=2, num_heads=4, cond_dim=32),
}
"""Networks by name: the published small model, and one whose trunk costs next to nothing."""


@dataclass(frozen=True)
class Workload:
    """What both samplers do: ``num_rows`` unconditional rows of ``length`` tokens, on ``num_steps`` steps."""

    model: Literal["small", "tiny"]
    vocab_size: int
    target_length: int
    length: int
    num_rows: int
    num_steps: int
    seed: int

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return Config(
            model=MODELS[self.model],
            codec=CodecConfig(vocab_size=self.vocab_size, target_length=self.target_length),
        )

    @property
    def network(self) -> DiTConfig:
        """The configuration of the network alone."""
        return MODELS[self.model]


@dataclass(frozen=True)
class Outcome:
    """What one run did.

    Attributes:
        tokens: (B, L) int64.
        num_calls: denoiser calls.
        num_row_steps: rows of all denoiser calls.
    """

    tokens: Tensor
    num_calls: int
    num_row_steps: int


def build_checkpoint(workload: Workload, dtype: DTypeName) -> Checkpoint:
    """Return a model with seeded random weights; bfloat16 weights are those of float32, cast once.

    No weight is zero: the logits are not flat and every branch of the network counts.
    """
    config, generator = workload.config, torch.Generator().manual_seed(workload.seed)
    with torch.random.fork_rng(devices=[]):  # the network draws its own initial weights
        denoiser = DiT(workload.network, config.codec, config.schedule.build())
    for name, parameter in denoiser.named_parameters():
        width = parameter.shape[-1] if parameter.ndim > 1 else 2500
        weights = torch.empty_like(parameter).normal_(0, width**-0.5, generator=generator)
        is_norm = name.endswith(("norm1.weight", "norm2.weight", "norm_final.weight"))
        parameter.data = (weights + 1 if is_norm else weights).to(DTYPES[dtype])
    denoiser = denoiser.eval().requires_grad_(False)
    denoiser.prepare()
    return Checkpoint(
        Path("random-weights"),
        config,
        config.codec.build(),
        denoiser.schedule,
        None,
        denoiser,
        DTYPES[dtype],
    )


def build_sampler(name: SamplerName, checkpoint: Checkpoint, workload: Workload) -> Callable[[], Outcome]:
    """Return a function that samples the whole workload once; the same noise at every call."""
    return (_planned if name == "planned" else _dense)(checkpoint, workload)


def _planned(checkpoint: Checkpoint, workload: Workload) -> Callable[[], Outcome]:
    """The sampler of this project, through the door that the server's rows take: `prime_core.sample`."""

    def run() -> Outcome:
        progress: list[int] = []
        samples = sample(
            checkpoint,
            n=workload.num_rows,
            steps=workload.num_steps,
            seed=workload.seed,
            max_tokens=workload.length,
            max_rows=workload.num_rows,
            progress=lambda done, total: progress.append(done),
        )
        tokens = torch.tensor([output.token_ids for output in samples])
        return Outcome(tokens, len(progress), sum(output.nfe for output in samples))

    return run


def _dense(checkpoint: Checkpoint, workload: Workload) -> Callable[[], Outcome]:
    sampler = DensePublished(
        checkpoint.denoiser,
        checkpoint.codec,
        checkpoint.schedule,
        num_rows=workload.num_rows,
        length=workload.length,
    )

    def run() -> Outcome:
        y, num_calls = sampler.sample(workload.num_steps, torch.Generator().manual_seed(workload.seed))
        return Outcome(checkpoint.codec.decode(y), num_calls, num_calls * workload.num_rows)

    return run


def measure_peak_memory(
    name: SamplerName, workload: Workload, dtype: DTypeName, num_threads: int
) -> int | None:
    """Return the peak memory in bytes that a sampler adds to the weights, in a process of its own.

    Resident memory of the process: what torch allocates and what the product library keeps beside it. The
    dense sampler's buffers have their full size in its first step, so it runs two.

    Returns:
        None where the operating system does not say (only Linux does).
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_memory_of_one_run, name, workload, dtype, num_threads).result()


def _memory_of_one_run(
    name: SamplerName, workload: Workload, dtype: DTypeName, num_threads: int
) -> int | None:
    torch.set_num_threads(num_threads)
    checkpoint = build_checkpoint(workload, dtype)
    gc.collect()
    before = reset_peak_memory()
    if before is None:
        return None
    if name == "dense_published":
        sampler = DensePublished(
            checkpoint.denoiser,
            checkpoint.codec,
            checkpoint.schedule,
            num_rows=workload.num_rows,
            length=workload.length,
        )
        sampler.sample(min(2, workload.num_steps), torch.Generator().manual_seed(workload.seed))
    else:
        build_sampler(name, checkpoint, workload)()
    return peak_memory() - before
